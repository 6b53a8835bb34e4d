"""The file behind FastAPI: answers, refusals as 422, threads, and the load test."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import magi_train

pytest.importorskip("fastapi", reason="pip install 'magi-train[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="pip install 'magi-train[serve]'")

from examples import load_test, serve  # noqa: E402


class Scaled(nn.Module):
    """A float and an integer input, a flag, and two results."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, ids, flag=True):
        return {"logits": self.linear(x) + ids[:, None], "ids": ids}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model.pt2"
    inputs = {"x": torch.randn(2, 4), "ids": torch.arange(2), "flag": True}
    module = Scaled()
    magi_train.export(module, inputs, path, dynamic={"batch": (1, 8)})
    app = serve.app_of(magi_train.load(path, buckets=(1, 4)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        end = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        yield module, door.getsockname()[1]
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ask(port, body):
    door = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        return load_test.post(door, body)
    finally:
        door.close()


def test_answers_are_the_module_s(served):
    module, port = served
    rows = [torch.randn(n, 4) for n in (1, 2, 3, 4)] * 4

    def one(x):
        return ask(port, {"x": x.tolist(), "ids": [7] * len(x), "flag": True})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, rows))
    for x, (status, answer) in zip(rows, answers, strict=True):
        wanted = module(x, torch.full((len(x),), 7))["logits"].detach()
        torch.testing.assert_close(torch.tensor(answer["logits"]), wanted)
        assert status == 200
        assert answer["ids"] == [7] * len(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [[1, 2, 3, 4]]}, ""),  # whole numbers are numbers
        ({"x": [[1.0, 2.0]]}, "x must be float32 [batch in 1..8, 4]: got [1, 2]"),
        ({"x": [[1.0, 2.0], [3.0]]}, "x must be float32 [batch in 1..8, 4]: expected sequence"),
        ({"x": "text"}, "x must be float32"),
        ({"x": [[True] * 4]}, "got bool"),
        ({"ids": [1.5]}, "ids must be int64 [batch in 1..8]: got float32"),
        ({"ids": [2**80]}, "ids must be int64"),
        ({"ids": [1, 2]}, "batch is 1 in x and 2 in ids"),
        ({"flag": False}, "flag was True when the model was exported"),
        ({"mask": [1]}, "no input is 'mask'"),
        ({"x": [[1.0] * 4] * 5, "ids": [1] * 5}, "the batch is 5, and the largest bucket 4"),
    ],
)
def test_what_does_not_fit_is_422_with_the_contract_s_words(served, change, words):
    status, answer = ask(served[1], {"x": [[1.0] * 4], "ids": [1], **change})
    assert status == (422 if words else 200), answer
    assert words in json.dumps(answer.get("detail", "")).replace("\\", "")


def test_the_page_says_what_goes_in_and_out(served):
    door = http.client.HTTPConnection("127.0.0.1", served[1], timeout=30)
    door.request("GET", "/")
    answer = json.loads(door.getresponse().read())
    door.close()
    assert answer["inputs"] == {"x": "float32 [batch in 1..8, 4]", "ids": "int64 [batch in 1..8]"}
    assert list(answer["outputs"]) == ["logits", "ids"]


def test_the_load_test_ends_by_itself(capfd):
    words = ["--requests", "200", "--clients", "2", "--width", "16", "--layers", "1"]
    (row,) = load_test.main([*words, "--runners", "program"])
    assert not row["wrong"]
    assert row["refused"] == 10
    assert row["answered"] == 190
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert "190 answers" in capfd.readouterr().out


def test_the_load_test_sees_a_wrong_answer():
    found = load_test.Clients(1, [(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))])

    class Door:
        def request(self, *args):
            pass

        def getresponse(self):
            return self

        status = 200

        def read(self):
            return json.dumps({"output": [[1.0, 1.0, 1.1]]})

    found._request(Door(), 1)
    found._request(Door(), 0)  # which is wrong, and must be refused
    assert len(found.wrong) == 2
    assert not found.milliseconds
