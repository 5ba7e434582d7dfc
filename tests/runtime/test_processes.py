"""Multi-process runs: those that JAX would detect, and no others."""

import jax
import numpy as np
import pytest
from jax._src import distributed
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster
from jax._src.lib import _jax

from diffusion.data import tfds
from diffusion.experiment import workdir
from diffusion.runtime import processes

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OTHERS = (  # what tells JAX of a cluster that the tests may happen to run on
    *("OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"),
    *("TPU_SKIP_MDS_QUERY", "MEGASCALE_NUM_SLICES", "MEGASCALE_COORDINATOR_ADDRESS"),
)


@pytest.fixture(autouse=True)
def joined(monkeypatch) -> list[tuple]:
    """No cluster around, and no process is joined: the arguments with which JAX would have been asked to."""
    for name in (*SLURM, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def cluster(num_processes: int, present: bool = True, opt_in: bool = False) -> type:
    """A cluster as JAX describes one. It is not of JAX's class, which would make it known to JAX for good."""

    class Fake:
        opt_in_only_method = opt_in
        is_env_present = staticmethod(lambda: present)
        get_process_count = staticmethod(lambda: num_processes)

    return Fake


def cloud_tpu_vm(monkeypatch, **metadata: str) -> None:
    """What a Cloud TPU VM tells its programs; `_` stands for `-` in the names."""
    answers = {name.replace("_", "-"): value for name, value in metadata.items()}

    def get_metadata(key: str) -> tuple[str, int]:
        return (answers[key], 200) if key in answers else ("", 404)

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)


def test_without_a_cluster_nothing_is_joined(joined):
    processes.join("", None, None)
    assert processes.detected_processes() == 1 and joined == []


def test_some_of_slurms_variables_are_no_cluster_but_all_that_jax_needs_are(joined, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"):  # a shell of salloc, or a batch script without srun
        monkeypatch.setenv(name, SLURM[name])
    processes.join("", None, None)
    assert processes.detected_processes() == 1 and joined == []
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.join("", None, None)
    assert processes.detected_processes() == 4 and joined == [()]


@pytest.mark.parametrize(("num_processes", "wanted"), [(1, []), (4, [()])])
def test_a_detected_cluster_is_joined_if_it_has_more_than_one_process(num_processes, wanted, joined, monkeypatch):
    absent, present = cluster(9, present=False), cluster(num_processes)
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [absent, present, cluster(9)])
    assert processes.detected_processes() == num_processes  # as JAX does, the first one that is there
    processes.join("", None, None)
    assert joined == wanted


def test_a_way_of_detection_that_has_to_be_asked_for_is_passed_over(joined, monkeypatch):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [cluster(4, opt_in=True)])
    processes.join("", None, None)
    assert processes.detected_processes() == 1 and joined == []


@pytest.mark.parametrize(
    ("endpoints", "num_slices", "count"),
    [
        ("10.0.0.1", "1", 1),
        ("host-a,host-b", "1", 2),
        ("a:0:10.0.0.1,b:1:10.0.0.2,c:2:10.0.0.3,d:3:10.0.0.4", "1", 4),
        ("host-a,host-b", "3", 6),
    ],
)
def test_a_cloud_tpu_vm_is_detected_by_its_metadata(endpoints, num_slices, count, joined, monkeypatch):
    tpu_env = f"ACCELERATOR_TYPE: 'v4-32'\nMEGASCALE_NUM_SLICES: '{num_slices}'\n"
    cloud_tpu_vm(monkeypatch, agent_worker_number="1", worker_network_endpoints=endpoints, tpu_env=tpu_env)
    assert processes.detected_processes() == count
    processes.join("", None, None)
    assert joined == ([()] if count > 1 else [])


def test_a_tpu_vm_whose_metadata_name_no_worker_is_one_process(monkeypatch):
    cloud_tpu_vm(monkeypatch)
    assert processes.detected_processes() == 1


def test_a_given_coordinator_is_used_as_given(joined, monkeypatch):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [cluster(4)])
    processes.join("host:1234", 2, 1)
    assert joined == [("host:1234", 2, 1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", 2, None), "given together"),
        (("host:1", None, 1), "given together"),
        (("", 2, 0), "given together"),
        (("host:1", None, None), "given together"),
        (("host:1", 2, 2), "--process_id=2 must be in 0…1"),
        (("host:1", 2, -1), "--process_id=-1 must be in 0…1"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(arguments, words, joined):
    with pytest.raises(ValueError, match=words):
        processes.join(*arguments)
    assert joined == []


def test_one_of_several_processes_that_are_not_joined_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="4 processes that are not joined; add --coordinator=HOST:PORT --num"):
        processes.join("", None, None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    processes.join("", None, None)


def test_what_is_used_of_jaxs_own_modules_exists():
    # They are private and may go with any version: then this fails first, and says which.
    assert all(hasattr(ClusterEnv, name) for name in ("_cluster_types", "opt_in_only_method", "is_env_present"))
    names = {env.__name__ for env in ClusterEnv._cluster_types}
    assert {"SlurmCluster", "GceTpuCluster", "GkeTpuCluster", "OmpiCluster", "K8sCluster"} <= names
    assert all(callable(env.get_process_count) for env in ClusterEnv._cluster_types)
    assert distributed.global_state.client is None and callable(_jax.DistributedRuntimeClient.wait_at_barrier)
    assert all(hasattr(cloud_tpu_cluster, name) for name in ("running_in_cloud_tpu_vm", "get_metadata"))


def fake_pair(monkeypatch, index: int, receive) -> None:
    """This process as number `index` of two; `receive` stands for the broadcast."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", receive)


def test_what_process_0_sends_arrives_bit_by_bit(monkeypatch):
    sent = {"x": np.float32([-0.0, np.nan, 1.5]), "n": np.int32(7), "empty": np.zeros((0, 3))}
    fake_pair(monkeypatch, 0, lambda tree: jax.tree.map(lambda leaf: leaf + np.uint8(0), tree))
    received = processes.from_first(sent)
    for name, leaf in sent.items():
        assert received[name].shape == leaf.shape and received[name].dtype == leaf.dtype
        assert received[name].tobytes() == leaf.tobytes()


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_hold_other_data_all_end(monkeypatch, index):
    processes.check_same(lambda: pytest.fail("it is asked for, and there is one process"), "")
    fake_pair(monkeypatch, index, None)
    held = ["ab", "ab"]

    def gather(own):
        assert own.tobytes() == held[index].encode()
        return np.stack([np.frombuffer(text.encode(), np.uint8) for text in held])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    processes.check_same(lambda: held[index], "other data")
    held[1] = "ac"
    with pytest.raises(ValueError, match="^process 1 against process 0: other data$"):
        processes.check_same(lambda: held[index], "other data")


def test_a_tree_is_sent_in_parts_of_one_size(monkeypatch):
    """All that a device holds at a time is a part."""
    rng, messages = np.random.default_rng(0), []
    tree = {"a": rng.normal(size=(3, 7)), "b": {"c": np.float32(-0.0), "d": rng.integers(0, 9, 50, np.int8)}}
    tree["e"] = np.zeros((0, 3))
    monkeypatch.setattr(processes, "PART_BYTES", 40)
    fake_pair(monkeypatch, 0, lambda part: messages.append(part) or part)
    processes.from_first(tree)
    assert {len(part) for part in messages} == {40} and len(messages) == -(-(3 * 7 * 8 + 4 + 50) // 40)
    sent = iter(messages)
    fake_pair(monkeypatch, 1, lambda _: next(sent))
    received = processes.from_first(jax.tree.map(lambda leaf: np.full_like(leaf, 1), tree))
    for found, leaf in zip(jax.tree.leaves(received), jax.tree.leaves(tree), strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (leaf.dtype, leaf.shape, leaf.tobytes())


def test_a_failure_of_process_0_is_raised_on_every_process(monkeypatch):
    messages = []

    def fails():
        raise OSError("no room for the checkpoint")

    fake_pair(monkeypatch, 0, lambda message: messages.append(message) or message)
    with pytest.raises(ValueError, match="^no room for the checkpoint$"):
        processes.on_first(fails)
    fake_pair(monkeypatch, 1, lambda own: messages[0])
    with pytest.raises(ValueError, match="^no room for the checkpoint$"):
        processes.on_first(lambda: pytest.fail("only process 0 does it"))


@pytest.mark.parametrize("error", [RuntimeError("no such device"), TypeError("no number"), KeyError("step")])
def test_a_bug_on_process_0_stops_every_process(monkeypatch, error):
    """It keeps its type and traceback on process 0; another process, which would wait for ever, names it."""
    messages = []

    def fails():
        raise error

    fake_pair(monkeypatch, 0, lambda message: messages.append(message) or message)
    with pytest.raises(type(error)) as raised:
        processes.on_first(fails)
    assert raised.value is error and raised.traceback[-1].name == "fails"
    fake_pair(monkeypatch, 1, lambda own: messages[0])
    with pytest.raises(ValueError, match=f"^process 0 failed: {type(error).__name__}: .*{error.args[0]}"):
        processes.on_first(lambda: pytest.fail("only process 0 does it"))


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_a_url_is_no_directory(url):
    for parse in (workdir.parse, tfds.resolve_data_dir):
        with pytest.raises(ValueError, match=f"={url} is not a local directory; remote paths"):
            parse(url)


def test_data_of_tfds_own_variable_are_not_taken_from_a_url(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/data")
    with pytest.raises(ValueError, match="gs://bucket/data is not a local directory"):
        tfds.resolve_data_dir(None)
