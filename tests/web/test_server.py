"""The server over a real socket, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from patient import Patient  # noqa: E402
from served import APPLE, Served, get, post, serving, wait_for  # noqa: E402
from smartmops import cli  # noqa: E402
from smartmops.rows.example import Example  # noqa: E402
from smartmops.serving.answering import Answerer, Settings  # noqa: E402
from smartmops.web.bodies import Limits  # noqa: E402

BODY = Limits().body


@pytest.fixture(scope="module")
def real(answerer: Answerer) -> Iterator[Served]:
    with serving(answerer) as found:
        yield found


@pytest.fixture
def client(real: Served) -> Any:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)


def alone(answerer: Answerer, **who: Any) -> str:
    return answerer.answer([answerer.ask(Example(APPLE[0]["content"], "", ""), Settings(8), **who)])[0].text


def test_tokens_of_each_prompt_count_once_however_many_answers_it_has(client: Any) -> None:
    def read(prompts: list[str], **more: int) -> int:
        count: int = client.completions.create(model="auto", prompt=prompts, max_tokens=1, **more).usage.prompt_tokens
        return count

    one = read(["The sky is"])
    assert one > 0 and read(["The sky is"], n=2) == one
    assert read(["The sky is", "The sky is"]) == 2 * one == read(["The sky is", "The sky is"], n=2)


@pytest.mark.parametrize("model", ["auto", "base", "apple", "banana"])
def test_a_chat_is_answered_by_whom_it_names(client: Any, answerer: Answerer, model: str) -> None:
    found = client.chat.completions.create(model=model, messages=APPLE, max_tokens=8)
    who = {"auto": {}, "base": {"base": True}}.get(model, {"expert": model})
    (choice,) = found.choices
    assert choice.message.content == alone(answerer, **who) and found.model == model
    assert choice.finish_reason in ("length", "stop") and found.usage.completion_tokens <= 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    told = choice.experts
    assert sum(told["weights"].values()) + told["left_to_base"] == pytest.approx(1, abs=1e-3)
    if model in answerer.experts:
        assert told["weights"][model] == 1.0


def test_a_stream_is_the_whole_answer_and_counts_it(client: Any, answerer: Answerer) -> None:
    chunks = list(client.chat.completions.create(model="auto", messages=APPLE, max_tokens=8, stream=True,
                                                 stream_options={"include_usage": True}))  # fmt: skip
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == alone(answerer)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("length", "stop") and chunks[-2].choices[0].experts["weights"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def test_a_stream_ends_as_openai_ends_it(real: Served) -> None:
    asked = {"model": "auto", "prompt": ["apple", "banana is"], "max_tokens": 3, "stream": True}
    lines = [line for line in post(f"{real.url}/v1/completions", json=asked).text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 2


def test_completions_go_on_with_several_prompts_and_choices(client: Any, answerer: Answerer) -> None:
    found = client.completions.create(model="auto", prompt=["apple is", "banana"], max_tokens=6, n=2, seed=3,
                                      temperature=1.2)  # fmt: skip
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    again = [answerer.answer([answerer.complete(text, Settings(6, 1.2, seed=3 + number))])[0].text
             for number, text in enumerate(["apple is", "apple is", "banana", "banana"])]  # fmt: skip
    assert [choice.text for choice in found.choices] == again
    greedy = client.completions.create(model="auto", prompt="apple is", max_tokens=12)
    stop = greedy.choices[0].text[2:4]
    cut = client.completions.create(model="auto", prompt="apple is", max_tokens=12, stop=stop)
    assert cut.choices[0].text == greedy.choices[0].text.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_tokens_are_told_with_how_likely_they_were(client: Any, answerer: Answerer) -> None:
    asked = {"model": "auto", "messages": APPLE, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    (choice,) = client.chat.completions.create(**asked).choices
    content = choice.logprobs.content
    assert 0 < len(content) <= 4 and "".join(each.token for each in content).strip() == choice.message.content
    for each in content:  # greedy: the most likely one was chosen
        assert len(each.top_logprobs) == 3 and each.logprob == each.top_logprobs[0].logprob <= 0
        assert each.token == each.top_logprobs[0].token and bytes(each.bytes or []).decode() in each.token
    *_, last = client.chat.completions.create(stream=True, **asked)
    assert [each.token for each in last.choices[0].logprobs.content] == [each.token for each in content]
    text = client.completions.create(model="base", prompt="apple is", max_tokens=4, logprobs=2).choices[0]
    found = text.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) and found.text_offset[0] == 0
    ids = torch.tensor([answerer.tokenizer("apple is")["input_ids"]])
    with torch.no_grad(), answerer.model.disable_adapter():
        logits = answerer.model(input_ids=ids).logits[0, -1]
    assert found.token_logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_the_gate_can_be_moved_by_hand(client: Any, answerer: Answerer) -> None:
    def answered(**shares: float) -> Any:
        body = {"gate_weights": shares}
        asked = client.chat.completions.create(model="auto", messages=APPLE, max_tokens=8, extra_body=body)
        return asked.choices[0]

    for name in answerer.experts:
        assert answered(**{name: 1.0}).message.content == alone(answerer, expert=name)
    assert answered(apple=0.25, banana=0.75).experts["weights"] == {"apple": 0.25, "banana": 0.75}


def test_32_clients_of_mixed_tasks_are_each_answered_as_alone(client: Any, answerer: Answerer) -> None:
    models, told = ["auto", "base", "apple", "banana"], dict[int, str]()

    def ask(number: int) -> None:
        found = client.chat.completions.create(model=models[number % 4], messages=APPLE, max_tokens=8)
        told[number] = found.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(600)
    who = [{}, {"base": True}, {"expert": "apple"}, {"expert": "banana"}]
    wanted = [alone(answerer, **each) for each in who]
    assert told == {number: wanted[number % 4] for number in range(32)}


def test_models_health_and_metrics(client: Any, real: Served) -> None:
    assert [model.id for model in client.models.list()] == ["auto", "base", "apple", "banana"]
    assert get(f"{real.url}/health").json() == {"status": "ok"}
    client.chat.completions.create(model="auto", messages=APPLE, max_tokens=1)
    text = get(f"{real.url}/metrics").text
    assert 'smartmops_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert f"smartmops_batches_total {real.batcher.counts.batches}\n" in text and "smartmops_waiting 0\n" in text


def test_models_tell_the_tasks_of_each_expert_where_the_run_knows_them(
    real: Served, answerer: Answerer, patient: Patient
) -> None:
    data = {each["id"]: each for each in get(f"{real.url}/v1/models").json()["data"]}
    assert "tasks" not in data["auto"] and "tasks" not in data["base"]
    for name in answerer.experts:
        shares = data[name]["tasks"]
        assert shares == answerer.tasks[name] and set(shares) == {"apple", "banana"}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for task in ("apple", "banana"):
        assert sum(data[name]["tasks"][task] for name in answerer.experts) == pytest.approx(1, abs=1e-3)
    with serving(patient) as served:
        assert all("tasks" not in each for each in get(f"{served.url}/v1/models").json()["data"])


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "pear"}, 404, "there is no model \"pear\": choose one of auto, base, apple, banana", "model"),
    ({"model": None}, 400, "model is null: choose one of auto", "model"),
    ({"messages": []}, 400, "messages is []: give a list", "messages"),
    ({"messages": "hello"}, 400, "messages is \"hello\": give a list", "messages"),
    ({"messages": [*APPLE, {"role": "assistant", "content": "x"}]}, 400, "end with one of the user", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "choose one of system, user, assistant", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts that are no text", "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character", "messages"),
    ({"messages": [{"role": "user", "content": "x " * 300}]}, 400, "of the model's 256 positions none", "messages"),
    ({"max_tokens": 33}, 400, "max_tokens is 33: choose a whole number from 1 to 32", "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens is 0: choose a whole number", "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens is true: choose a whole number", "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "both given: choose one", "max_tokens"),
    ({"temperature": 3}, 400, "temperature is 3: choose a number from 0 to 2", "temperature"),
    ({"temperature": "hot"}, 400, "temperature is \"hot\": choose a number", "temperature"),
    ({"top_p": 0}, 400, "top_p is 0: choose a number above 0", "top_p"),
    ({"seed": -1}, 400, "seed is -1: choose a whole number from 0", "seed"),
    ({"n": 17}, 400, "n is 17: choose a whole number from 1 to 16", "n"),
    ({"stop": ["a", ""]}, 400, "stop is [\"a\", \"\"]: give a text", "stop"),
    ({"stream": "yes"}, 400, "stream is \"yes\": choose true or false", "stream"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty is 0.5, and is not supported: leave it out", "frequency_penalty"),
    ({"echo": 0}, 400, "echo is 0, and is not supported: leave it out", "echo"),
    ({"presence_penalty": False}, 400, "presence_penalty is false, and is not supported", "presence_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "is not supported: leave it out", "tools"),
    ({"logprobs": 3}, 400, "logprobs is 3: choose true or false", "logprobs"),
    ({"top_logprobs": 3}, 400, "top_logprobs is 3 without logprobs: set that to true, too", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "choose a whole number from 0 to 20", "top_logprobs"),
    ({"gate_weights": {"pear": 1}}, 400, "\"pear\" is no expert: give an object with shares of apple, banana", "gate_weights"),
    ({"gate_weights": [1]}, 400, "gate_weights is [1]: give an object with shares", "gate_weights"),
    ({"gate_weights": {"apple": 0.5}}, 400, "gate_weights sum to 0.5: give shares that sum to 1", "gate_weights"),
    ({"gate_weights": {"apple": -1}}, 400, "apple is -1: choose a number from 0 to 1", "apple"),
    ({"model": "apple", "gate_weights": {"apple": 1}}, 400, "gate_weights go with model auto", "gate_weights"),
    ({"temprature": 1}, 400, "\"temprature\" is no field that is known here: leave it out", "temprature"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "status", "said", "param"), BAD, ids=[str(each[0])[:50] for each in BAD])
def test_what_cannot_be_answered_is_said_in_openais_form(
    real: Served, changes: dict[str, Any], status: int, said: str, param: str | None
) -> None:
    found = post(f"{real.url}/v1/chat/completions", content=json.dumps({"model": "auto", "messages": APPLE} | changes))
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert said in error["message"] and "\n" not in error["message"]


def test_what_changes_nothing_may_be_said(client: Any) -> None:
    bare = client.chat.completions.create(model="auto", messages=APPLE, max_tokens=1)
    same = client.chat.completions.create(model="auto", messages=APPLE, max_tokens=1, user="me", presence_penalty=0, n=1,
                                          logprobs=False, response_format={"type": "text"})  # fmt: skip
    assert same.choices == bare.choices


@pytest.mark.parametrize(("body", "status", "said"), [
    (b"{", 400, "the body is no JSON"), (b"\xff", 400, "the body is no JSON"), (b"[1]", 400, "send a JSON object"),
    (b"[" * 100_000, 400, "the body is no JSON"), (b" " * (BODY + 1), 413, f"more than {BODY} bytes"),
])  # fmt: skip
def test_a_body_that_is_no_request_is_refused(real: Served, body: bytes, status: int, said: str) -> None:
    for content in (body, iter([body])):  # with its length told, and without
        found = post(f"{real.url}/v1/chat/completions", content=content)
        assert found.status_code == status and said in found.json()["error"]["message"]


def test_unknown_paths_and_methods_are_told_in_the_same_form(real: Served) -> None:
    assert get(f"{real.url}/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert get(f"{real.url}/v1/completions").status_code == 405


def test_only_a_key_of_the_file_opens(patient: Patient) -> None:
    with serving(patient, keys=("one", "zwei-é")) as served:
        asked = {"model": "auto", "messages": APPLE}
        for header in ({}, {"Authorization": "Bearer on"}, {"Authorization": "Basic one"}):
            found = post(f"{served.url}/v1/chat/completions", json=asked, headers=header)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert get(f"{served.url}/v1/models", headers=header).status_code == 401
        assert get(f"{served.url}/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
        spelt = {"Authorization": "Bearer zwei-é".encode()}
        assert get(f"{served.url}/v1/models", headers=spelt).status_code == 200
        assert get(f"{served.url}/health").status_code == 200
    assert patient.batches == []


def test_a_full_queue_says_when_to_come_back(patient: Patient) -> None:
    with serving(patient, room=2, started=False) as served:
        many = {"model": "auto", "messages": APPLE, "n": 3}
        assert post(f"{served.url}/v1/chat/completions", json=many).status_code == 400
        served.batcher.submit([patient.ask(), patient.ask()])
        found = post(f"{served.url}/v1/chat/completions", json=many | {"n": 1})
        assert found.status_code == 429 and int(found.headers["retry-after"]) > 0
        assert found.json()["error"]["code"] == "queue_full"
        served.batcher.start()
        served.batcher.cancel()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_answered_no_longer(patient: Patient, stream: bool) -> None:
    with serving(patient) as served:
        body = json.dumps({"model": "auto", "messages": APPLE, "stream": stream}).encode()
        with socket.create_connection(served.socket.getsockname()) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(lambda: patient.batches and served.batcher.running)
        wait_for(lambda: served.batcher.counts.cancelled == 1)  # it ends without being let go
        assert all(question.cancelled for question in patient.batches[0])


def test_told_to_end_it_answers_what_it_has_and_takes_no_more(patient: Patient) -> None:
    with serving(patient) as served, httpx.Client(base_url=served.url, timeout=600) as kept:
        asked = {"model": "auto", "messages": APPLE}
        with kept.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as under_way:
            lines = under_way.iter_lines()
            assert "one" in next(line for line in lines if '"one"' in line)
            served.batcher.close()
            refused = post(f"{served.url}/v1/chat/completions", json=asked)
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert get(f"{served.url}/health").status_code == 503
            served.server.handle_exit(signal.SIGTERM, None)
            patient.let_go = True
            assert [line for line in lines if line][-1] == "data: [DONE]"
        served.thread.join(600)
        assert not served.thread.is_alive()


def test_told_to_end_twice_it_gives_up(patient: Patient) -> None:
    with serving(patient) as served, httpx.Client(base_url=served.url, timeout=600) as kept:
        asked = {"model": "auto", "messages": APPLE, "stream": True}
        with kept.stream("POST", "/v1/chat/completions", json=asked) as under_way:
            lines = under_way.iter_lines()
            assert next(line for line in lines if '"one"' in line)
            for _ in range(2):
                served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(600)
        assert not served.thread.is_alive() and patient.batches[0][0].cancelled


def command(*arguments: str) -> subprocess.Popen[str]:
    source = str(Path(cli.__file__).parents[1])
    return subprocess.Popen([sys.executable, "-c", "from smartmops.cli import main; main()", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": source})  # fmt: skip


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(run: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with command("serve", str(run), "--port", "0", "--api-key-file", str(tmp_path / "keys")) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.endswith("serves auto, base, apple, banana\n"), line
        client = openai.OpenAI(base_url=line.split()[0], api_key="secret")
        assert client.chat.completions.create(model="auto", messages=APPLE, max_tokens=2).choices
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0


def test_an_address_that_cannot_be_had_is_told_before_a_model_is_loaded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["smartmops", "serve", str(run), "--port", str(port)])
        with pytest.raises(SystemExit):
            cli.main()
    error = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port} cannot be had (Address already in use)" in error and error.count("\n") == 1


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "smartmops.web.server")
    with pytest.raises(ImportError, match=r'pip install "smartmops\[serve\]"'):
        import smartmops.web.server  # noqa: F401


def test_an_answer_that_was_broken_off_may_stand_empty_in_a_conversation(real: Served) -> None:
    turns = [*APPLE, {"role": "assistant", "content": ""}, *APPLE]
    found = post(f"{real.url}/v1/chat/completions", json={"model": "auto", "messages": turns})
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] > 0
