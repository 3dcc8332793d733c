"""A retry finds its operation, also after a restart. Another request does not."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from everstep.engine import Model
from tests.runtime.local import Local, batch
from tests.scenario import MODEL


def test_retry_after_restart_gets_the_same_future(home: Path, pico: Model) -> None:
    key = {"X-Idempotency-Key": uuid.uuid4().hex}
    with Local(home, pico) as service:
        session = service.post("create_session", key)["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        run = service.result(service.post("create_model", **create)["request_id"])["model_id"]
        sampler: dict[str, Any] = {
            "session_id": session,
            "sampling_session_seq_id": 0,
            "base_model": MODEL,
        }
        sampler_id = service.post("create_sampling_session", **sampler)["sampling_session_id"]
        requests = [
            ("create_model", create),
            ("forward_backward", {"seq_id": 1, "forward_backward_input": batch()}),
            ("optim_step", {"seq_id": 2, "adam_params": {}}),
            ("save_weights", {"seq_id": 3, "path": "a"}),
            ("save_weights_for_sampler", {"seq_id": 4, "path": "a"}),
            ("save_weights_for_sampler", {"seq_id": 5, "sampling_session_seq_id": 1}),
            ("load_weights", {"seq_id": 6, "path": f"tinker://{run}/weights/a", "optimizer": True}),
            (
                "load_weights",
                {
                    "session_id": session,
                    "model_seq_id": 1,
                    "path": f"tinker://{run}/weights/a",
                    "optimizer": False,
                },
            ),
            (
                "asample",
                {
                    "sampling_session_id": sampler_id,
                    "seq_id": 0,
                    "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
                    "sampling_params": {"max_tokens": 4},
                },
            ),
        ]
        of_the_run = ("session_id", "sampling_session_id")
        for _, body in requests:
            if not any(name in body for name in of_the_run):
                body["model_id"] = run
        answers, results = [], []
        for route, body in requests:  # one after the other: some need what another one saved
            answers.append(service.post(route, **body))
            results.append(service.result(answers[-1]["request_id"]))
    assert not [result for result in results if "error" in result]
    with service.after() as service:
        assert service.post("create_session", key)["session_id"] == session
        again = service.post("create_sampling_session", **sampler)
        assert again["sampling_session_id"] == sampler_id
        requests[5][1]["sampling_session_seq_id"] = 2  # the SDK counts it up with each attempt
        for (route, body), answer, result in zip(requests, answers, results, strict=True):
            assert service.post(route, **body) == answer
            assert service.result(answer["request_id"]) == result
        assert {kind for kind, _ in service.finished} <= {"restore"}, "nothing is executed again"


def test_other_payload_under_used_seq_id_is_refused(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        service.send(run, "forward_backward", forward_backward_input=batch())
        others: dict[str, dict[str, Any]] = {
            "forward_backward": {"forward_backward_input": batch(shift=1)},
            "forward": {"forward_input": batch()},
            "optim_step": {"adam_params": {}},
        }
        for route, body in others.items():
            status, text = service.refused(route, model_id=run, seq_id=1, **body)
            assert status == 400
            assert f"seq_id 1 of {run} was used before, for a forward_backward" in text
        step = {"adam_params": {"learning_rate": 0.01, "weight_decay": 0.1}}
        first = service.train(reference, 0)[1]
        assert service.do(run, "optim_step", **step) == first, "the first one counted"


def test_checkpoint_changes_can_be_retried_after_restart(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.do(run, "save_weights", path="a")
        at = f"training_runs/{run}/checkpoints/weights/a"
        changes: list[tuple[str, str, Any]] = [
            ("PUT", f"{at}/ttl", {"ttl_seconds": 3600}),
            ("POST", f"{at}/publish", None),
            ("DELETE", f"{at}/publish", None),
            ("DELETE", at, None),
        ]
    for change in range(len(changes)):
        for _ in range(2):
            with service.after() as service:
                for method, route, body in [changes[change]] * 2:
                    answer = service.http.request(method, route, json=body)
                    assert answer.status_code == 204, answer.text
                found = service.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
                states = [(each["expires_at"] is not None, each["public"]) for each in found]
                assert states == [[(True, False)], [(True, True)], [(True, False)], []][change]
