"""Runs a server of fakes: `python serve_fake.py '{"model": …, "settings": {…}, "server": {…}}'`; prints nothing itself."""

import json
import sys

from light_core.config import EngineConfig
from light_core.errors import LightError
from light_core.processes import ProcessSettings, run_server


def main() -> int:
    wanted = json.loads(sys.argv[1])
    options = {"engine": "fakes:FakeEngine", "tokenizer": "fakes:load_tokenizer", "server": "fakes:serve"} | wanted["settings"]
    try:
        settings = ProcessSettings(**options)
        code = run_server(EngineConfig(model=wanted["model"], max_num_seqs=wanted["max_num_seqs"]), wanted["server"], settings, refs=())
    except LightError as error:
        print(error.block(), file=sys.stderr)
        return error.exit_code
    assert "torch" not in sys.modules, "the supervisor must not pay for torch"
    return code


if __name__ == "__main__":
    sys.exit(main())
