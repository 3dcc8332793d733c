"""A finished session accepts nothing new, and finishes accepted operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everstep.engine import Model
from tests.runtime.local import Local, batch
from tests.scenario import MODEL


def test_finished_session_refuses_new_operations_and_finishes_old_ones(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        sampler = service.post(
            "create_sampling_session",
            session_id=service.session(),
            sampling_session_seq_id=0,
            base_model=MODEL,
        )["sampling_session_id"]
        expected = service.train(reference, 0)
        saved = service.do(reference, "save_weights", path="a")["path"]
        place: dict[str, Any] = {"session_id": service.session(), "model_seq_id": 2}
        sample = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}}
        step: dict[str, Any] = {"adam_params": {}}
        with service.steps.shut():
            accepted = service.step(run, 0)
            service.post(f"sessions/{service.session()}/finish", reason={"type": "success"})
            body = {"model_id": run, "seq_id": 3}
            refused = [
                service.refused("forward_backward", **body, forward_backward_input=batch()),
                service.refused("optim_step", **body, **step),
                service.refused("optim_step", **body, adam_params={"learning_rate": "fast"}),
                service.refused("save_weights", **body, path="b"),
                service.refused("save_weights_for_sampler", **body, path="b"),
                service.refused("load_weights", **body, path=saved),
                service.refused("load_weights", **place, path=saved),
                service.refused("create_model", **place, base_model=MODEL),
                service.refused("asample", sampling_session_id=sampler, seq_id=0, **sample),
            ]
            again = service.send(run, "forward_backward", 1, forward_backward_input=batch())
        for status, text in refused:
            assert status == 400
            assert f"Session {service.session()} is finished (success)" in text
        assert [service.result(each) for each in accepted] == expected
        assert again == accepted[0], "a retry of what was accepted before is still that"
        status, text = service.refused("session_heartbeat", session_id=service.session())
        assert (status, "is finished" in text) == (410, True)
        listed = service.http.get(f"training_runs/{reference}/checkpoints").json()["checkpoints"]
        assert [each["tinker_path"] for each in listed] == [saved]


def test_another_session_continues_from_checkpoint(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        saved = service.do(run, "save_weights", path="a")["path"]
        expected = service.train(run, 1)
        service.post(f"sessions/{service.session()}/finish")
        body: dict[str, Any] = {
            "session_id": service.post("create_session")["session_id"],
            "model_seq_id": 0,
        }
        future = service.post("load_weights", **body, path=saved, optimizer=True)
        assert service.train(service.result(future["request_id"])["model_id"], 1) == expected
