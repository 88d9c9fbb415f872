"""Serve a folder over HTTP in byte ranges, as real servers do: `python range_server.py FOLDER`.

A process of its own, so that it can be killed with all its connections, and standard library only.
Prints its port. GET /drop/N cuts the next N answers in the middle and closes their connections;
GET /drops says how many of them are left.
"""

import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ranges(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    drops = 0

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        if self.path.startswith("/drop/"):
            Ranges.drops = int(self.path.rpartition("/")[2])
        if self.path.startswith("/drop"):
            self.say(str(Ranges.drops).encode())
        else:
            self.answer(body=True)

    def say(self, words):
        self.send_response(200)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    def answer(self, body):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        whole = file.read_bytes()
        begin, end = 0, len(whole)
        if ranged := self.headers.get("Range"):
            first, last = ranged.removeprefix("bytes=").split("-")
            begin = int(first) if first else end - int(last)
            end = min(int(last) + 1, end) if first and last else end
        self.send_response(206 if ranged else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        if ranged:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(whole)}")
        self.end_headers()
        if not body:
            return
        drop = Ranges.drops > 0 and end - begin > 1
        Ranges.drops -= drop
        self.close_connection = drop
        self.wfile.write(whole[begin : (begin + end) // 2 if drop else end])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients come and go


if __name__ == "__main__":
    folder = sys.argv[1]
    with Server(("127.0.0.1", 0), lambda *rest: Ranges(*rest, directory=folder)) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
