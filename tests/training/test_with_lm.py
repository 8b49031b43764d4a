"""The loop with the library's own model and task."""

import jax
import numpy as np

from lcattn.models import LMConfig
from lcattn.nn import SoftmaxAttentionConfig
from lcattn.tasks import DataConfig, MQARConfig, MQARTaskConfig
from lcattn.training import MeshConfig, OptimizerConfig, TrainConfig, evaluate, load_model, train


def test_language_model_on_recall_sharded_and_loaded_again(tmp_path):
    rows = MQARConfig(length=16, num_pairs=2, vocab_size=32, num_examples=64)
    task = MQARTaskConfig(
        train=(rows,),
        evaluation=(rows.replace(num_examples=12),),  # The last batch holds filler rows.
        data=DataConfig(batch_size=8),
    ).make()
    model = LMConfig(
        vocab_size=32,
        width=16,
        num_layers=1,
        pattern=("softmax",),
        mixers={"softmax": SoftmaxAttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)},
        mlp_width=16,
        dropout=0.1,
    )
    config = TrainConfig(
        num_steps=4,
        log_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        mesh=MeshConfig(fsdp=4),
        tensorboard=False,
    )
    result = train(task, model, config, tmp_path)
    embedding = result.model.embedding.embedding[...]
    assert embedding.sharding.shard_shape(embedding.shape) == (32, 4)

    loaded = load_model(tmp_path)
    assert len(loaded.embedding.embedding[...].sharding.device_set) == 1
    found = evaluate(loaded, task.evaluation(), task.metrics)
    assert set(found) == {f"{name}/{m}" for name in task.slices for m in ("loss", "accuracy")}
    for name, value in found.items():
        np.testing.assert_allclose(value, result.metrics[name], rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.metrics))
