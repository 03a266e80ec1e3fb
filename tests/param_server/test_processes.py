"""Shard and replicas as processes: what clients see, and what kills do not change."""

from __future__ import annotations

import numpy as np
import pytest

from param_server.client import ParamServerClient, ReplicaClient, UnavailableError, Version


def assert_predicts_like(trainer, replica, inputs):
    prediction = replica.predict(inputs)
    assert prediction.version == trainer.head
    expected = trainer.expected(inputs)
    assert sorted(prediction.outputs) == sorted(expected)
    for task, values in expected.items():
        np.testing.assert_allclose(prediction.outputs[task], values, atol=1e-6, rtol=0)


def test_replicas_equal_the_trainer_after_full_deltas_deletes_and_kills(kit, children):
    shard = children.shard()
    replicas = [children.replica(shard.address, name=f"replica-{number}") for number in range(2)]
    clients = [ReplicaClient(replica.address, timeout_s=60) for replica in replicas]
    inputs = kit.make_inputs(np.random.default_rng(3), 50)
    keys = kit.all_keys()
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        with pytest.raises(UnavailableError, match="has not received a version"):
            clients[0].predict(inputs)
        trainer.train(keys)
        trainer.full()
        for step in range(3):
            changed = keys[step::4]
            trainer.train(changed)
            trainer.delta(changed, deletes=keys[3 + 4 * step : 11 : 7])
        for one in clients:
            kit.wait_for_version(one, trainer.head)
            assert_predicts_like(trainer, one, inputs)
            assert one.status().num_rows == len(trainer.rows) == client.status().num_rows

        # A replica that is killed comes back with the newest version, at the same address.
        replicas[0].kill()
        trainer.train(keys[:9])
        trainer.delta(keys[:9])
        children.replica(shard.address, replicas[0].address)
        kit.wait_for_version(clients[0], trainer.head)
        assert_predicts_like(trainer, clients[0], inputs)

        # Without a shard the replicas go on answering; with it back they go on following.
        shard.kill()
        assert_predicts_like(trainer, clients[1], inputs)
        restarted = children.shard(shard.address)
        assert restarted.address == shard.address
        assert client.status().head == trainer.head
        trainer.train(keys[5:15])
        trainer.delta(keys[5:15])
        trainer.full()
        for one in clients:
            kit.wait_for_version(one, trainer.head)
            assert_predicts_like(trainer, one, inputs)
            applied = [version for version, _ in one.status().applied]
            assert applied == sorted(set(applied))
        assert clients[1].status().num_reloads == 0
    assert restarted.terminate() == 0
    assert replicas[1].terminate() == 0
    for one in clients:
        one.close()
