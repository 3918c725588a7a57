# SPDX-License-Identifier: MIT
"""The test's end of agent.py: commands a holder of buffers that is a process of its own, as another user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.interop.users import User

HERE = Path(__file__).parent


class AgentError(Exception):
    """A command failed in the agent; `kind` is the class of its exception."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class RemoteAgent:
    """agent.py in a process of its own: `agent("allocate", {...})` commands it and returns what it answers."""

    def __init__(self, user: User, environment: dict[str, str]) -> None:
        command = [sys.executable, "-B", str(HERE / "agent.py")]
        pipe = subprocess.PIPE
        self.process = user.start(command, environment=environment, stdin=pipe, stdout=pipe)

    def __call__(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the agent ended with status {self.process.wait()} during {command}; see its traceback in stderr"
        answer = json.loads(line)
        if "error" in answer:
            raise AgentError(answer["error"], answer["text"])
        return answer["result"]

    def end(self) -> None:
        """Have the agent close what it has, and end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(60)
        self.process.stdout.close()
        assert status == 0, f"the agent ended with status {status}"

    def kill(self) -> None:
        """End the agent by SIGKILL: nothing of it can be tidy."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
