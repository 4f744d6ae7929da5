"""The parts of tracing that need no XLA device."""

import itertools

import pytest
import torch

from lightning_modules.strategies.xla.spmd import XLASPMDStrategy
from lightning_modules.strategies.xla.tracing import TracingStrategy, _SameRows, shard_arguments


def test_arguments_get_the_layouts_that_the_graph_annotates():
    graph = (
        "module @m attributes {a = 1} {\n"
        '  func.func @main(%arg0: tensor<4x2xbf16>, %arg1: tensor<8xf32> {mhlo.sharding = "{x}"}) -> tensor<f32> {\n'
        '    %0 = stablehlo.custom_call @Sharding(%arg0) {backend_config = "", mhlo.sharding = "{y}"} : whatever\n'
        "  }\n}\n"
    )
    sharded = shard_arguments(graph)
    assert '%arg0: tensor<4x2xbf16> {mhlo.sharding = "{y}"}, %arg1: tensor<8xf32> {mhlo.sharding = "{x}"})' in sharded
    assert sharded.count("{y}") == 2


def test_arguments_of_loop_bodies_are_left_out():
    """The bodies of loops name their arguments %arg0, %arg1, ... too."""
    graph = (
        "module @m {\n"
        "  func.func @main(%arg0: tensor<4xf32>, %arg1: tensor<2xf32>) -> tensor<f32> {\n"
        '    %0 = stablehlo.custom_call @Sharding(%arg0) {mhlo.sharding = "{a}"} : whatever\n'
        "  }\n"
        "  func.func private @body(%arg1: tensor<2xf32>) {\n"
        '    %0 = stablehlo.custom_call @Sharding(%arg1) {mhlo.sharding = "{b}"} : whatever\n'
        "  }\n}\n"
    )
    sharded = shard_arguments(graph)
    assert '(%arg0: tensor<4xf32> {mhlo.sharding = "{a}"}, %arg1: tensor<2xf32>) ->' in sharded
    assert sharded.count("mhlo.sharding") == 3


def test_the_rows_have_the_shape_of_the_run_and_never_end():
    rows = list(itertools.islice(_SameRows(3, 5), 4))
    assert all(batch.input_ids_BT.shape == (3, 5) and batch.supervised == 15 for batch in rows)
    assert all(tensor.dtype == torch.int64 for tensor in (rows[0].labels_BT, rows[0].segment_ids_BT))


def test_the_strategy_runs_nothing():
    strategy = TracingStrategy(2)
    assert isinstance(strategy, XLASPMDStrategy) and strategy.data_parallel_size == 2 and strategy.graph == ""
    strategy.sync()  # torch_xla is not even imported
    with pytest.raises(AssertionError):
        _ = strategy.backend
