"""What the pack costs a host that only starts, and what it touches when it works."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from finetuning import photos


def test_a_quick_start_no_network_and_nothing_outside_the_hosts_folders(tmp_path, root, comfyui):
    base, pictures = tmp_path / "host", photos(tmp_path / "photos", 2)
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {"HOME": str(home), "COMFYUI_PATH": str(comfyui), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(root / "tests" / "host" / "footprint.py"), str(base), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["loaded"]
    assert found["imported"] == [], "the trainers' packages are loaded when something trains"
    assert found["other"] == []
    assert any(path.startswith(str(base / "models" / "loras")) for path in found["written"]), "it did work"
    outside = [
        path for path in map(Path, found["written"]) if not path.is_relative_to(base) and path != Path(os.devnull)
    ]
    temporary = Path(tempfile.gettempdir())
    assert [path for path in outside if temporary not in (path.parent, path.parent.parent)] == []
    assert list(home.iterdir()) == []
