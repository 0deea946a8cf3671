"""A connection that a test speaks by hand: a socket, or on Windows the end of a named pipe that is used like one."""

import os
import queue
import socket
import struct
import threading


class PipeEnd:
    """What is sent is cut into its frames, by the lengths before them; each is one message of the pipe."""

    def __init__(self, connection):
        self.connection = connection
        self._unsent = self._unread = b""
        self._frames = queue.Queue()  # a socket has room for a few that nobody reads yet
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def _send(self):
        for frame in iter(self._frames.get, None):
            try:
                self.connection.send_bytes(frame)
            except OSError:
                return  # the other side is gone, or this one has been closed
        self.connection.close()

    def sendall(self, data):
        self._unsent += data
        while len(self._unsent) >= 4:
            (size,) = struct.unpack_from("!i", self._unsent)
            if len(self._unsent) < 4 + size:
                break
            frame, self._unsent = self._unsent[4 : 4 + size], self._unsent[4 + size :]
            self._frames.put(frame)

    def recv(self, size):
        if not self._unread:
            try:
                frame = self.connection.recv_bytes()
            except (EOFError, OSError, RuntimeError, TypeError):  # the last two if it has been closed meanwhile
                return b""
            self._unread = struct.pack("!i", len(frame)) + frame
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def makefile(self, mode):
        return self

    def read(self, size):
        data = b""
        while len(data) < size:
            more = self.recv(size - len(data))
            if not more:
                break
            data += more
        return data

    def fileno(self):
        return -1 if self.connection.closed else self.connection.fileno()

    def settimeout(self, seconds):
        """Its reads wait for ever; the test's own limit ends them."""

    def shutdown(self, how):
        """Its end, both ways, once all has been sent."""
        self._frames.put(None)

    def close(self):
        self.shutdown(None)
        self._sender.join(0.5)
        self.connection.close()  # which ends a sending that nobody reads
        self._sender.join()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def connect(address):
    """Connect to a listener of miniplug's."""
    if os.name == "nt":
        from multiprocessing.connection import Client

        return PipeEnd(Client(address, "AF_PIPE"))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    return sock
