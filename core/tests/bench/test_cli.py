"""`light bench serve` as it is called, and options that cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from light_core.cli import bench
from light_core.cli.main import command
from light_core.errors import ConfigError, LightError


def run(server: Any, *arguments: str) -> str:
    given = ["bench", "serve", "--url", server.url, "--input-len", "12", "--output-len", "5", *arguments]
    result = CliRunner().invoke(command, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_what_is_sent(server: Any) -> None:
    output = run(server, "--num-prompts", "6", "--max-concurrency", "2")
    bodies = server.bodies
    assert len(bodies) == 7, "one to warm up"
    assert {len(body["prompt"]) for body in bodies} == {12} and len({tuple(body["prompt"]) for body in bodies}) == 7
    assert {body["model"] for body in bodies} == {"first"} and {body["max_tokens"] for body in bodies} == {5}
    assert all(100 <= token < 500 for body in bodies for token in body["prompt"]), "the server says how many tokens there are"
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in bodies) and server.most <= 2
    table = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert (table["completed"], table["failed"], table["total_output_tokens"], table["total_input_tokens"]) == ("6", "0", "30", "72")
    assert "request_goodput" not in table


def test_a_sweep(server: Any, tmp_path: Path, look_at: Callable[[Path], tuple[int, int]], answer_together: Callable[[int], Any]) -> None:
    at_a_time = []

    def alone(handler: Any, body: Any) -> None:
        at_a_time.append(server.in_flight)
        _usual(handler, body)

    # One to warm up, then eight of which each waits for the one before, then eight of which four come before one is answered.
    server.answers = [alone] * 9 + [answer_together(4)] * 4
    written, plot = tmp_path / "results.json", tmp_path / "plot.png"
    sizes = (
        "--num-prompts",
        "8",
        "--max-concurrency",
        "1,4",
        "--goodput",
        "ttft:600000",
        "--metric-percentiles",
        "90,99.9",
        "--save-detailed",
    )
    run(server, *sizes, "--output-json", str(written), "--plot", str(plot))
    results = json.loads(written.read_text())
    assert [one["max_concurrency"] for one in results] == [1, 4] and [one["request_rate"] for one in results] == ["inf", "inf"]
    assert at_a_time == [1] * 9 and server.most == 4 and [one["total_output_tokens"] for one in results] == [8, 4 * 5 + 4 * 5]
    for one in results:
        assert one["request_goodput"] == one["request_throughput"] == pytest.approx(8 / one["duration"])
        assert one["output_throughput"] == pytest.approx(one["total_output_tokens"] / one["duration"])
    assert results[0]["p90_itl_ms"] is None, "an answer of one piece has no gaps"
    assert results[1]["p99.9_itl_ms"] >= results[1]["p90_itl_ms"] >= 0
    for one in results:
        assert len(one["ttfts"]) == 8 and one["mean_ttft_ms"] == pytest.approx(sum(one["ttfts"]) / 8 * 1e3)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 17, "each run has fresh prompts"
    look_at(plot)


def test_rates_and_failures(server: Any, tmp_path: Path) -> None:
    def refuse(handler: Any, body: Any) -> None:
        handler.send_json(429, {"error": {"message": "too many"}})

    server.answers = [_usual, refuse]
    written = tmp_path / "results.json"
    run(server, "--num-prompts", "10", "--request-rate", "50", "--burstiness", "2", "--json", str(written))
    result = json.loads(written.read_text())
    assert (result["completed"], result["failed"], result["errors"]) == (9, 1, ["the server answered 429: too many"])
    assert (result["request_rate"], result["max_concurrency"], result["burstiness"]) == (50.0, None, 2.0)
    assert result["duration"] > 0


def _usual(handler: Any, body: Any) -> None:
    handler.begin()
    handler.event({"choices": [{"text": "x"}]})
    handler.end()


def test_a_seed_repeats_the_prompts(server: Any) -> None:
    def prompts(seed: str) -> list[list[int]]:
        server.bodies.clear()
        run(server, "--num-prompts", "3", "--seed", seed)
        return sorted(body["prompt"] for body in server.bodies)

    assert prompts("1") == prompts("1") != prompts("2")


def test_the_first_request_fails(server: Any) -> None:
    server.answers = [lambda handler, body: handler.send_json(400, {"error": {"message": "token id 400 is out of range"}})]
    with pytest.raises(LightError, match="the first request failed: the server answered 400: token id 400") as caught:
        run(server, "--num-prompts", "3")
    assert "--vocab-size" in caught.value.remedy and len(server.bodies) == 1


def test_a_server_that_does_not_tell(server: Any) -> None:
    server.card = {}
    run(server, "--num-prompts", "3", "--input-len", "200")
    assert max(token for body in server.bodies for token in body["prompt"]) > 20_000
    run(server, "--num-prompts", "3", "--input-len", "200", "--vocab-size", "150")
    assert max(token for body in server.bodies[-3:] for token in body["prompt"]) < 150


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--max-concurrency", "1,x"), "--max-concurrency '1,x' cannot be read"),
        (("--request-rate", "-3"), "--request-rate -3.0 is out of range"),
        (("--plot", "/no/such/folder/a.png"), "cannot be written"),
        (("--output-json", "/no/such/folder/a.json"), "cannot be written"),
        (("--workload", "mixed"), "lengths of its own"),
    ],
)
def test_bad_options_stop_before_anything_is_sent(server: Any, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(server, *arguments)
    assert not server.bodies


def test_step_needs_a_step() -> None:
    for batch, prefill in (("", ""), ("4,0", "")):
        with pytest.raises(ConfigError, match="there is no step to measure"):
            bench.step("demo", batch, 64, prefill, 4, 0, None, None)
