"""Shards read through a shell command, where the recipe allows it."""

import io
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile

from mixmae.base.errors import UsageError
from mixmae.trainer.data.stores.blocks import CachedStore
from mixmae.trainer.data.stores.store import plain_name
from mixmae.trainer.recipe.sections.data import Cache, Network


class PipeStore(CachedStore):
    """A shell command that writes a file to its standard output; `{}` stands for the file's name."""

    def __init__(self, location: str, network: Network, cache: Cache, first_delay: float = 0.5) -> None:
        """Opens a store. Arguments and errors as those of RemoteStore."""
        self._command = location.removeprefix("pipe:")
        if not network.allow_shell:
            raise UsageError(
                f"shards {location} would run their command in a shell on every node; "
                "data.network.allow_shell=true allows that"
            )
        if "{}" not in self._command:
            raise UsageError(f"shards {location} have no {{}} where the file's name goes")
        super().__init__(location, network, cache, sys.maxsize, first_delay)

    def read_whole(self, name: str) -> bytes:
        return self._fetch(name, 0, 0)

    def size(self, name: str) -> int:
        """Bytes of a file; runs the command for it."""
        return len(self.read_whole(name))

    def _load(self, name: str, number: int, least: int) -> bytes:
        command = self._command.replace("{}", shlex.quote(plain_name(name)))
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            ) as process:
                try:
                    output = self._output(process)
                    code = process.wait(self._network.timeout)
                except subprocess.TimeoutExpired as error:
                    raise TimeoutError(f"{command!r}: no output within {self._network.timeout:g} s") from error
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        if code:
            raise OSError(f"{command!r} ended with code {code}: {said[-1]}")
        if len(output) < least:
            raise OSError(f"{command!r} ends at {len(output)}, expected {least}")
        return output

    def _output(self, process: "subprocess.Popen[bytes]") -> bytes:
        """All output; a command may run for long, but not be silent for `network.timeout` seconds."""
        assert process.stdout is not None
        output = io.BytesIO()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(self._network.timeout):
                piece = os.read(process.stdout.fileno(), 2**20)
                if not piece:
                    return output.getvalue()
                output.write(piece)
        raise subprocess.TimeoutExpired(process.args, self._network.timeout)
