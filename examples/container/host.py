"""A web service made of plugins, to run as the one process of a container: every file in the folder ``plugins`` is one.

    python3 host.py              serves on port 8080, until SIGTERM or Ctrl-C
    python3 host.py PORT
    python3 host.py --check      starts every plugin once, and lists what the service has

``GET /`` lists it too; ``GET /text/slug?title=Hello`` calls the method ``slug`` of ``plugins/text.py``. A plugin that
crashes costs the requests that it had: they are answered with status 502, and the next one gets a fresh process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HERE = Path(__file__).resolve().parent

try:
    import miniplug
except ImportError:  # not installed, nor beside this file as in the image: as in a fresh clone, two folders up
    sys.path.append(str(HERE.parent.parent))
    import miniplug


def become_a_child() -> None:
    """As process 1, start the application as a child process, and return there only.

    Process 1 inherits every process whose parent is gone, and must reap it; but a program that reaps whatever ends takes
    the ends of its own children from those who wait for them. So process 1 does that and nothing else: it passes
    signals on, reaps, and ends with the application, and the kernel then ends whatever is left.
    """
    if os.getpid() != 1:
        return
    watched = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    application = os.fork()
    if application == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        return
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            os.kill(application, number)
            continue
        pid = -1
        while pid:  # one SIGCHLD may stand for several
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == application:
                os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def find_plugins() -> dict[str, miniplug.Plugin]:
    """A plugin for each file, by its name. Each starts on first use, and again after a crash."""
    return {path.stem: miniplug.Plugin(f"{path}:Tool", name=path.stem, max_restarts=10, restart_window=60.0, call_timeout=60.0)
            for path in miniplug.discover(HERE / "plugins", "*.py")}


def tools(plugins: dict[str, miniplug.Plugin]) -> list[str]:
    """What there is to call. Raises PluginError for a plugin that does not come up."""
    return [f"{name}.{method.name}{method.signature}" for name, plugin in plugins.items()
            for methods in plugin.describe().values() for method in methods.values()]


class Request(BaseHTTPRequestHandler):
    plugins: dict[str, miniplug.Plugin]
    timeout = 5  # seconds that a client may say nothing

    def do_GET(self) -> None:
        try:
            status, answer = 200, self.answer()
        except (miniplug.PluginNotFound, miniplug.MethodNotFound) as error:
            status, answer = 404, {"error": str(error)}
        except miniplug.RemoteError as error:  # the method raised
            status, answer = 500, {"error": f"{error.type_name}: {error.message}"}
        except miniplug.CallTimeout as error:
            status, answer = 504, {"error": str(error)}
        except miniplug.PluginError as error:
            status, answer = 502, {"error": str(error)}
        body = json.dumps(answer, default=str).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> Any:
        url = urlsplit(self.path)
        name, _, method = url.path.strip("/").partition("/")
        if not name:
            return tools(self.plugins)
        if name not in self.plugins:
            raise miniplug.PluginNotFound(f"no such plugin: {name}")
        if not method or method.startswith("_"):  # which a proxy has of its own
            raise miniplug.MethodNotFound(f"no such method: {method}")
        return getattr(self.plugins[name].dispense(), method)(**dict(parse_qsl(url.query)))

    def log_message(self, format: str, *arguments: Any) -> None:
        logging.getLogger("service").info(format, *arguments)


def serve(port: int, plugins: dict[str, miniplug.Plugin]) -> None:
    """Answer requests until SIGTERM or Ctrl-C. What has come by then has 4 of Docker's 10 seconds."""
    log = logging.getLogger("service")
    server = ThreadingHTTPServer(("", port), type("Request", (Request,), {"plugins": plugins}))
    server.daemon_threads = False  # so that server_close() waits for the answers

    def stop(number: int, frame: Any) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        threading.Thread(target=server.shutdown).start()  # which waits for this thread

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log.info("listening on port %d, with %s", server.server_port, ", ".join(plugins))
    server.serve_forever(poll_interval=0.1)
    answering = threading.Thread(target=server.server_close)  # which waits for the requests that have come
    answering.start()
    answering.join(4.0)
    for plugin in plugins.values():
        plugin.close(grace=1.0)  # what still runs is cut off, and answered with status 502
    answering.join()
    log.info("stopped")


def main(arguments: list[str]) -> int:
    plugins = find_plugins()
    if arguments == ["--check"]:
        print("\n".join(tools(plugins)))
        return 0
    if len(arguments) > 1 or not all(argument.isdigit() for argument in arguments):
        print("usage: host.py [PORT], or host.py --check", file=sys.stderr)
        return 2
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
    serve(int(arguments[0]) if arguments else 8080, plugins)
    return 0


if __name__ == "__main__":
    become_a_child()
    sys.exit(main(sys.argv[1:]))
