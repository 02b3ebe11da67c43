"""The commands on docs/command_line.md run as they stand; the server is started and asked."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.hosts import build_llava, image_side, randomise
from tests.processors import llava_processor
from vision_remember import attach_vision_remember, compress_projector
from vision_remember.adapters.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "command_line.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line)[1:] for block in BLOCKS for line in block.splitlines()]
SHORT = [command for command in COMMANDS if command[0] in ("inspect", "report", "export")]
TEMPLATE = (
    "{% for message in messages %}w1 {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}w2"
)


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what the page talks about: ``my-model``, ``my-adapter`` and ``page.png``."""
    folder = tmp_path_factory.mktemp("page")
    model = build_llava()
    processor = llava_processor("clip", image_side(model), model.config.vision_config.patch_size)
    processor.chat_template = TEMPLATE
    model.save_pretrained(folder / "my-model")
    processor.save_pretrained(folder / "my-model")
    compress_projector(model, processor, "adaptive_avg_pool", ratio=4)
    handle = attach_vision_remember(model, [1, 3])
    randomise(handle)
    handle.save_pretrained(folder / "my-adapter")
    Image.new("RGB", (40, 32), "red").save(folder / "page.png")
    return folder


def test_the_page_shows_every_command_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert listed == {command[0] for command in COMMANDS}
    assert listed == {command.name for command in app.registered_commands}
    assert len(SHORT) == 8


@pytest.mark.parametrize("command", SHORT, ids=" ".join)
def test_a_command_runs_as_it_stands(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    if "--json" in command:
        assert json.loads(result.stdout)
    elif command[0] == "report":
        assert (folder / "report.html").is_file()
    elif command[0] == "export":
        assert "largest difference" in result.stdout
        assert list((folder / "graphs").iterdir())


def ask(port: int, body: dict[str, Any], *, patience: float) -> dict[str, Any]:
    """The server's answer, as soon as it listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)


def test_the_server_answers_a_question_about_an_image(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "my-model", "--adapter", "my-adapter", "--port", str(port), "--device", "cpu"]
    arguments = ["vision-remember", *command]
    code = f"import sys; sys.argv = {arguments!r}; from vision_remember.adapters.cli import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stdout=log, stderr=log)
    picture = base64.b64encode((folder / "page.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "w3 w4"},
    ]
    try:
        body = {"model": "my-model", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        found = ask(port, body, patience=120)
    finally:
        server.terminate()
        server.wait(timeout=30)
    # The adapter pools 64 cells to 16 tokens, so the processor was told, too; "w1", "w3", "w4" and "w2" make 20.
    assert found["usage"]["prompt_tokens"] == 20, (folder / "serve.log").read_text()
    assert found["choices"][0]["message"]["content"]
