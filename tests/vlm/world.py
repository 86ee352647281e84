"""Small folders in the published layouts, a tiny model beside them, and judges of a script."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mmforget.cache import Cache
from mmforget.config import Plan, plan
from mmforget.engine import Engine, Runtime
from mmforget.vlm import mini
from mmforget.vlm.judges import JudgePrompt
from mmforget.workbench import Bench, Workbench
from tests.vlm.families import make

PERSONS, QUESTIONS = 12, 3
TRAIN, VAL = 6, 3


@dataclass(frozen=True)
class Place:
    """Folders: people (FIUBench), crafts (SafeEraser), tiny (a LLaVA of random weights)."""

    root: Path

    @property
    def store(self) -> dict[str, Any]:
        """Return where runs and models are kept."""
        return {"runs": self.root / "runs", "cache": self.root / "cache"}

    def people(self, *more: str) -> list[str]:
        """Return words of FIUBench on this folder; later ones take the place of earlier ones."""
        return self._words("fiubench", "people", "benchmark.max_new_tokens=6", *more)

    def crafts(self, *more: str) -> list[str]:
        """Return words of SafeEraser on this folder."""
        return self._words("safeeraser", "crafts", "benchmark.max_new_tokens=6", *more)

    def _words(self, benchmark: str, folder: str, *more: str) -> list[str]:
        words = [
            f"benchmark=vlm/{benchmark}",
            "data=local",
            f"data.root={self.root / folder}",
            "model=pretrained",
            f"model.path={self.root / 'tiny'}",
            "runtime.device=cpu",
            "runtime.threads=1",
            "runtime.progress=false",
            "benchmark.training.epochs=0",
            *more,
        ]
        return list({word.partition("=")[0]: word for word in words}.values())


def make_place(root: Path) -> Place:
    """Write both small worlds and the tiny model."""
    mini.write_fiubench(root / "people", 0, persons=PERSONS, questions=QUESTIONS, size=32)
    mini.write_safeeraser(root / "crafts", 0, train=TRAIN, val=VAL, size=32)
    make("llava", root / "tiny")
    return Place(root)


def opened(place: Place, words: Sequence[str]) -> tuple[Workbench, Bench, Plan]:
    """Return an opened benchmark, its data read and its request applied."""
    made = plan(["method=original", *words])
    workbench = Workbench(Engine(Runtime(threads=1, progress=False)), Cache(place.root / "cache"))
    return workbench, workbench.bench(made), made


class Scripted:
    """A judge that answers by a function, and remembers what it was shown."""

    heuristic = False
    note = ""

    def __init__(self, say: Callable[[JudgePrompt], str], name: str = "scripted") -> None:
        self.say = say
        self.name = name
        self.seen: list[JudgePrompt] = []

    def __call__(self, prompts: Sequence[JudgePrompt]) -> list[str]:
        self.seen += prompts
        return [self.say(prompt) for prompt in prompts]


@dataclass
class Server:
    """An endpoint that judges; it dies behind so many answers.

    Attributes:
        url: Its base address.
        last: Answers it gives before it dies; None: it lives.
        asked: The user message of each request that was answered.
    """

    url: str
    last: int | None
    asked: list[str]


@contextmanager
def served(say: Callable[[str], str], last: int | None = None) -> Iterator[Server]:
    """Give a server of `/v1/chat/completions` on this machine; behind `last` answers it has 500.

    Args:
        say: Returns the answer to a user message.
        last: See `Server`; may be set later.
    """
    found = Server("", last, [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            dead = found.last is not None and len(found.asked) >= found.last
            text = body["messages"][-1]["content"]
            if not dead:
                found.asked.append(text)
            reply = {} if dead else {"choices": [{"message": {"content": say(text)}}]}
            self.send_response(500 if dead else 200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
