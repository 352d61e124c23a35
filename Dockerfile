# A run that answers, or the server of a federation, in a container.
#
#   docker build -t smartmops .
#   docker run -p 8000:8000 -v $PWD/runs/mine:/run:ro smartmops serve /run --host 0.0.0.0 --api-key-file /run/keys.txt
#   docker build --build-arg EXTRAS=federated,privacy -t smartmops-server .
#   docker run -p 9092:9092 -v $PWD:/work smartmops-server federate-server ...   (docs/federation.md)
#
# The base of a run lies in the mounted folder, or is named by hub id and kept in /cache: mount that to keep it.
FROM python:3.11-slim

ARG EXTRAS=serve
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface SMARTMOPS_CACHE=/cache/smartmops

WORKDIR /opt/smartmops
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src ./src
# torch first and alone: whatever else wants a torch then finds this one.
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch \
    && pip install --constraint constraints.txt ".[$EXTRAS]"

RUN useradd --create-home --uid 1000 smartmops && mkdir -p /cache /work && chown smartmops /cache /work
USER smartmops
WORKDIR /work
EXPOSE 8000 9092

ENTRYPOINT ["smartmops"]
CMD ["--help"]
