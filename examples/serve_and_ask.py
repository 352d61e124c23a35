"""Start a server for a finished run, ask it with OpenAI's client, and end it.

python examples/serve_and_ask.py runs/support [--port 8000]
"""

from __future__ import annotations

import argparse
import subprocess
import time

from openai import APIConnectionError, OpenAI

QUESTIONS = ("My kettle stopped working after a day.", "Where is my lamp? The number is 4321. Ana, Graz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder that `train` wrote")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args()

    server = subprocess.Popen(["smartmops", "serve", given.run, "--port", str(given.port)])
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{given.port}/v1", api_key="none")
        print("can be asked for:", ", ".join(waited(client, server)))
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model="auto", messages=messages, max_tokens=given.max_tokens)
            print(f"{question}\n  {reply.choices[0].message.content!r}\n  by {reply.choices[0].experts}")
        print("base, as it comes: ", end="")
        for chunk in client.chat.completions.create(
            model="base", messages=messages, max_tokens=given.max_tokens, stream=True
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()  # it answers what it has taken, and ends
        server.wait(60)


def waited(client: OpenAI, server: subprocess.Popen[bytes]) -> list[str]:
    """What the server offers, once it is there.

    Raises:
        SystemExit: it ended before.
    """
    while server.poll() is None:
        try:
            return [model.id for model in client.models.list()]
        except APIConnectionError:
            time.sleep(0.5)
    raise SystemExit("the server ended: its last lines say why")


if __name__ == "__main__":
    main()
