"""What can be said of the driver's launches without a driver."""

from starling.model.ops.cuda.driver import knows_overlap


def test_kernels_overlap_where_the_gpu_and_the_drivers_graphs_know_how() -> None:
    assert knows_overlap(90, 12030) and knows_overlap(100, 13000)
    assert not knows_overlap(90, 12020)  # R535
    assert not knows_overlap(89, 13000)
