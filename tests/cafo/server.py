"""A small OpenAI-compatible server on 127.0.0.1: real HTTP, scripted answers."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


@contextmanager
def serve(fail_first=0, answers_at_once=1, refuse="\0", answer=None):
    """Yield (base URL, requests); each request is recorded as its path, key and body. Images of prompts with
    `refuse` in them are refused for their content. answer: makes the one answer to the text of a chat."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization")
            requests.append({"path": self.path, "key": key, **body})
            if len(requests) <= fail_first:
                return self.reply(429, {"error": {"message": "slow down"}})
            if refuse in body.get("prompt", ""):
                error = {
                    "code": "content_policy_violation",
                    "message": "Your request was rejected by our safety system.",
                }
                return self.reply(400, {"error": error})
            if self.path.endswith("/images/generations"):
                buffer = io.BytesIO()
                Image.new("RGB", (5, 7), (17 * len(requests) % 256, 0, 0)).save(buffer, "PNG")
                return self.reply(
                    200, {"created": 0, "data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
                )
            asked = body["messages"][-1]["content"]
            texts = [f"answer {len(requests)}.{i}\n to {asked}" for i in range(answers_at_once)]
            texts = texts if answer is None else [answer(asked)]
            choices = [
                {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                for i, text in enumerate(texts)
            ]
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}
            return self.reply(200, reply)

        def reply(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
