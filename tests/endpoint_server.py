"""A chat endpoint as OpenAI's, vLLM's or llama.cpp's server, on this machine, in a thread: what it says and what goes wrong is
programmed by each test.

    with serving() as server:
        server.says = lambda messages: "I cannot help with that."        # replies, from the messages
        server.plan["the last user message"] = [Status(429, {"Retry-After": "0"}), CutStream(2)]   # first these, then replies
        server.always = Hang(5)                                         # or this for everything

`server.url` is the address to give, `server.asked` holds the bodies of the requests, `server.headers` their headers.
"""

import contextlib
import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest


@dataclasses.dataclass(frozen=True)
class Status:
    """Answers with a status of HTTP. body: sent as JSON, or a text as it is."""

    code: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: object = dataclasses.field(default_factory=lambda: {"error": {"message": "no"}})


@dataclasses.dataclass(frozen=True)
class Hang:
    """Sends nothing for so many seconds, or until the server ends, and then the reply. drip: sends headers meanwhile."""

    seconds: float
    drip: bool = False


@dataclasses.dataclass(frozen=True)
class Drop:
    """Breaks the connection off without any answer."""


@dataclasses.dataclass(frozen=True)
class CutBody:
    """Sends so many bytes of the body, of which `honest` tells the whole length, and breaks off."""

    size: int
    honest: bool = True


@dataclasses.dataclass(frozen=True)
class CutStream:
    """Streams so many pieces of the reply, without a finish_reason. done: whether "[DONE]" follows."""

    pieces: int
    done: bool = False


@dataclasses.dataclass(frozen=True)
class Raw:
    """Sends this body with status 200."""

    body: object
    content_type: str = "application/json"


@dataclasses.dataclass(frozen=True)
class Says:
    """Replies with these fields of the message, and of the choice and the body around it."""

    message: dict
    finish_reason: str | None = "stop"
    choice: dict = dataclasses.field(default_factory=dict)
    body: dict = dataclasses.field(default_factory=dict)


Act = Status | Hang | Drop | CutBody | CutStream | Raw | Says


@dataclasses.dataclass
class Server:
    """models: what is listed, None for no list. model: the name in replies, None for the one that was asked for. key: that
    requests must carry, "" for none. refuses: names of fields that are rejected as unknown."""

    url: str = ""
    says: Callable[[list[dict]], str] = lambda messages: f"You said: {messages[-1]['content']}"
    models: list[dict] | None = dataclasses.field(default_factory=lambda: [{"id": "tiny", "object": "model"}])
    model: str | None = None
    key: str = ""
    refuses: tuple[str, ...] = ()
    plan: dict[str, list[Act]] = dataclasses.field(default_factory=dict)
    always: Act | None = None
    delay: float = 0.0
    asked: list[dict] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    paths: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    active: int = 0
    most_active: int = 0

    def act(self, prompt: str) -> Act | None:
        """Returns what is due for a prompt: the next of its plan, or `always`; None for an ordinary reply."""
        with self.lock:
            acts = self.plan.get(prompt)
            return acts.pop(0) if acts else self.always

    @property
    def prompts(self) -> list[str]:
        """Returns the last messages of the requests so far."""
        return [body["messages"][-1]["content"] for body in self.asked]


class Handler(http.server.BaseHTTPRequestHandler):
    server_: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status: int, body: object, content_type="application/json", headers: dict | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def let_in(self) -> bool:
        server = self.server_
        server.headers.append(dict(self.headers))
        server.paths.append(self.path)
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            said = f"Incorrect API key provided: {self.headers.get('Authorization')}."
            self.send(401, {"error": {"message": said, "code": "invalid_api_key"}})
            return False
        return True

    def do_GET(self):
        if not self.let_in():
            return
        if self.path != "/v1/models" or self.server_.models is None:
            return self.send(404, {"detail": "Not Found"})
        self.send(200, {"object": "list", "data": self.server_.models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.let_in():
            return
        server = self.server_
        with server.lock:
            server.asked.append(body)
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            if self.path != "/v1/chat/completions":
                return self.send(404, {"detail": "Not Found"})
            time.sleep(server.delay)
            self.answer(body)
        except (BrokenPipeError, ConnectionResetError):  # who asked has given up
            self.close_connection = True
        finally:
            with server.lock:
                server.active -= 1

    def answer(self, body: dict) -> None:
        server = self.server_
        act = server.act(body["messages"][-1]["content"])
        if unknown := [name for name in server.refuses if name in body]:
            return self.send(
                400, {"error": {"message": f"Unsupported parameter: '{unknown[0]}'.", "param": unknown[0]}}
            )
        if isinstance(act, Status):
            return self.send(act.code, act.body, headers=act.headers)
        if isinstance(act, Drop):
            return self.hang_up()
        if isinstance(act, Raw):
            return self.send(200, act.body, act.content_type)
        if isinstance(act, Hang):
            self.hang(act)
        text = server.says(body["messages"])
        says = act if isinstance(act, Says) else Says({"content": text})
        if body.get("stream"):
            return self.stream(body, says, act if isinstance(act, CutStream) else None)
        whole = self.whole(body, says)
        if isinstance(act, CutBody):
            data = json.dumps(whole).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            if act.honest:
                self.send_header("Content-Length", str(len(data)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data[: act.size])
            return self.hang_up()
        self.send(200, whole)

    def whole(self, body: dict, says: Says) -> dict:
        words = len(str(says.message.get("content") or "").split())
        choice = {"index": 0, "message": {"role": "assistant", **says.message}, "finish_reason": says.finish_reason}
        asked = sum(len(message["content"]) for message in body["messages"]) // 4 + 1
        usage = {"prompt_tokens": asked, "completion_tokens": words, "total_tokens": words + asked}
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": self.server_.model or body["model"]}
        return {**head, "choices": [choice | says.choice], "usage": usage, **says.body}

    def stream(self, body: dict, says: Says, cut: CutStream | None) -> None:
        head = {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": self.server_.model or body["model"],
        }
        pieces = [{"role": "assistant"}]
        for name, value in says.message.items():
            words = value.split(" ") if isinstance(value, str) else [value]
            pieces += [
                {name: word if i == 0 or not isinstance(word, str) else f" {word}"} for i, word in enumerate(words)
            ]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces if cut is None else pieces[: cut.pieces]:
            self.event({**head, "choices": [{"index": 0, "delta": piece, "finish_reason": None}]})
        if cut is None:
            last = {"index": 0, "delta": {}, "finish_reason": says.finish_reason}
            self.event({**head, "choices": [last | says.choice], **says.body})
            if "stream_options" in body:
                self.event({**head, "choices": [], "usage": self.whole(body, says)["usage"]})
        if cut is None or cut.done:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def event(self, value: dict) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def hang(self, act: Hang) -> None:
        end = time.monotonic() + act.seconds
        if act.drip:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while time.monotonic() < end and not self.server_.ended.wait(0.05):
            if act.drip:
                self.wfile.write(b"X-Wait: 1\r\n")
                self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)


class Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a test need not wait for those that hang

    def handle_error(self, request, client_address):
        pass


@contextlib.contextmanager
def serving(**fields) -> Iterator[Server]:
    """Yields a running server; fields: of `Server`."""
    server = Server(**fields)
    with Threads(("127.0.0.1", 0), type("OurHandler", (Handler,), {"server_": server})) as running:
        server.url = f"http://127.0.0.1:{running.server_address[1]}"
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.ended.set()
            running.shutdown()


@pytest.fixture
def endpoint_server() -> Iterator[Server]:
    """A server whose plan a test fills in."""
    with serving() as server:
        yield server
