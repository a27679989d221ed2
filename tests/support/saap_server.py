"""``saap`` for a shell, forked off one process that has imported what commands need: python saap_server.py FOLDER MORE.

FOLDER/saap is the program. It hands its arguments, its directory and its streams over and ends as the command does.
MORE is a JSON object: what is added to the words of a command (`bench`, `devices baseline`), which saves time.
"""

import json
import os
import socket
import sys
from pathlib import Path

from support.forked_commands import ended, prepare

PROGRAM = """#!{python} -IS
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps([sys.argv[1:], os.getcwd()]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(8) or 1))
"""


def answer(words: list[str], place: str, streams: list[int]) -> int:
    """What a shell and the interpreter do before a command begins, and the command; its exit code."""
    os.chdir(place)
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
        os.dup2(stream, number)
        made = open(number, "r" if name == "stdin" else "w", closefd=False)  # noqa: SIM115
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)
    sys.argv = ["saap", *words]
    return ended()


def serve(folder: Path, more: dict[str, list[str]]) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        server.listen()
        program = folder / "partial"
        program.write_text(PROGRAM.format(python=sys.executable, address=str(folder / "socket")))
        program.chmod(0o755)
        program.rename(folder / "saap")  # now it may be called
        while True:
            client, _ = server.accept()
            message, streams, _, _ = socket.recv_fds(client, 1 << 16, 3)
            words, place = json.loads(message)
            child = os.fork()
            if child == 0:
                added = more.get(words[0], []) + more.get(" ".join(words[:2]), [])
                os._exit(answer([*words, *added], place, streams))
            for stream in streams:
                os.close(stream)
            client.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            client.close()


if __name__ == "__main__":
    prepare()
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
