"""The plugin of connection_peer.py: connects as often as it is told, and does one thing with what comes."""

import sys
import time
from multiprocessing.connection import Client


def echo(connection):
    while True:
        connection.send_bytes(connection.recv_bytes())


def nap(connection):
    while True:
        connection.recv_bytes()
        time.sleep(0.010)
        connection.send_bytes(b"")


def count(connection):
    while True:
        for item in range(int(connection.recv_bytes())):
            connection.send_bytes(b"%d" % item)


def run(connection):
    try:
        {"echo": echo, "nap": nap, "count": count}[sys.argv[2]](connection)
    except (EOFError, OSError):
        pass


connections = [Client(sys.argv[1]) for _ in range(int(sys.argv[3]))]
if connections[1:]:
    import threading

    for each in connections[1:]:
        threading.Thread(target=run, args=(each,)).start()
run(connections[0])
