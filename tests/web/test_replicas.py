"""Two replicas under Ray Serve answer as one server does."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from served import APPLE  # noqa: E402
from smartmops import cli  # noqa: E402
from smartmops.options.finished.serving import ServeConfig  # noqa: E402
from smartmops.rows.example import Example  # noqa: E402
from smartmops.serving.answering import Answerer, Settings  # noqa: E402

PATIENT = 600  # seconds, of a request to a machine that may be busy


@pytest.mark.slow
def test_two_replicas_answer_as_one_server_does(run: Path, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from smartmops.web.replicas import application, start

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else nothing of it runs beside a busy process
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}})  # fmt: skip
    try:
        start(application(ServeConfig(run=run, max_tokens=8), 2, cpus=0.1), "127.0.0.1", port)
        url = f"http://127.0.0.1:{port}"
        alone = answerer.answer([answerer.ask(Example(APPLE[0]["content"], "", ""), Settings(8))])[0].text
        for _ in range(4):
            told = httpx.post(
                f"{url}/v1/chat/completions", json={"model": "auto", "messages": APPLE}, timeout=PATIENT
            ).json()
            assert told["choices"][0]["message"]["content"] == alone
        asked = {"model": "auto", "messages": APPLE, "stream": True}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=PATIENT).text.endswith("data: [DONE]\n\n")
        assert httpx.post(f"{url}/v1/completions", content=b"{", timeout=PATIENT).status_code == 400
        states = serve.status().applications["default"].deployments["smartmops"].replica_states
        assert states == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
