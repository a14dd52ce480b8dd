"""Processes that somebody else starts: torchrun, srun, mpirun or jsrun, and what the trainer must know of them.

Lightning compares what was started with `devices` x `num_nodes` in some cases only. In the others each process trains alone,
without a message, on all images. So the two are compared before there is a trainer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from finetune import hardware
from finetune.errors import ConfigError

_SRUN = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")  # only srun sets them, a batch script has none


class Launch(NamedTuple):
    """Processes that a launcher has started.

    Attributes:
        launcher: What started them.
        processes: How many there are in all.
        nodes: On how many machines.
    """

    launcher: str
    processes: int
    nodes: int

    @property
    def per_node(self) -> int:
        """How many there are on each machine."""
        return self.processes // self.nodes


def find_launch() -> Launch | None:
    """Return what a launcher has started, of which this process is one; None if no launcher did.

    Raises:
        ConfigError: If the processes would not find each other.
    """
    env = os.environ
    if torch.distributed.is_available() and "TORCHELASTIC_RUN_ID" in env:
        return _launch("torchrun", env, "WORLD_SIZE", per_node="LOCAL_WORLD_SIZE")
    if "SLURM_NTASKS" in env or "SLURM_STEP_NUM_TASKS" in env:
        return _find_srun(env)
    if LSFEnvironment.detect():
        return _launch("jsrun", env, "JSM_NAMESPACE_SIZE", per_node="JSM_NAMESPACE_LOCAL_SIZE")
    return _find_mpirun(env)


def settle_processes(config: MutableMapping[str, Any]) -> str | None:
    """Let the options of a trainer agree with the processes that a launcher has started.

    `devices` auto and `num_nodes` 1, which are the defaults, take what was started; other values are compared with it.

    Args:
        config: The options of the trainer, which are changed.

    Returns:
        What was set, for the user; None if nothing was.

    Raises:
        ConfigError: If the options contradict what was started.
    """
    plugins = config["plugins"] if isinstance(config["plugins"], Iterable) else [config["plugins"]]
    if any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return None  # the user says how processes find each other
    launch = find_launch()
    if launch is None:
        return None
    devices, nodes = config["devices"], int(config["num_nodes"])
    number = launch.per_node if str(devices) == "auto" else hardware.device_count(devices, str(config["accelerator"]))
    if number != launch.per_node or nodes not in (1, launch.nodes):
        raise ConfigError(
            f"{launch.launcher} has started {_count(launch.processes, 'process')} on {_count(launch.nodes, 'node')}, but "
            f"trainer.devices is {devices} and trainer.num_nodes is {nodes}: expected trainer.devices {launch.per_node} and "
            f"trainer.num_nodes {launch.nodes}, one process for each device. Leave both options out to take what "
            f"{launch.launcher} has started, or start as many processes as there are devices."
        )
    config["devices"] = launch.per_node if str(devices) == "auto" else devices
    config["num_nodes"] = launch.nodes
    if launch.launcher == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))  # Lightning asks for it; --ntasks sets none
    if launch.processes == 1 or (config["devices"], config["num_nodes"]) == (devices, nodes):
        return None
    return (
        f"{launch.launcher} has started {_count(launch.processes, 'process')}: trainer.devices {launch.per_node}, "
        f"trainer.num_nodes {launch.nodes}"
    )


def _find_srun(env: Mapping[str, str]) -> Launch | None:
    started_by_srun = any(name in env for name in _SRUN)
    tasks = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")
    if not SLURMEnvironment.detect():  # a job that is called bash or interactive
        if tasks > 1 and started_by_srun:
            raise ConfigError(
                f"srun has started {tasks} tasks in an interactive job, whose tasks do not find each other: each would train "
                "alone. Give the step another name (srun --job-name train …), or start the processes with torchrun."
            )
        return None
    if tasks > 1 and not started_by_srun:
        raise ConfigError(
            f"SLURM gave this job {tasks} tasks, but this process was not started by srun, so it is the only one. Put srun in "
            "front of the command; or, for one process with several cores, ask SLURM for --ntasks 1 and --cpus-per-task."
        )
    nodes = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") if name in env), None)
    return _launch("srun", env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", nodes=nodes)


def _find_mpirun(env: Mapping[str, str]) -> Launch | None:
    size = next((name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE") if name in env), None)
    if size is None or _number(env, size) == 1:
        return None
    if not MPIEnvironment.detect():
        raise ConfigError(
            f"mpirun has started {_number(env, size)} processes, which find each other through mpi4py only: without it each "
            "would train alone. Install mpi4py, or start the processes with torchrun."
        )
    local = next((n for n in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE") if n in env), None)
    return _launch("mpirun", env, size, per_node=local)


def _launch(launcher: str, env: Mapping[str, str], size: str, per_node: str | None = None, nodes: str | None = None) -> Launch:
    """Read how many processes there are; those of one node, or the number of nodes, may be unknown."""
    processes = _number(env, size)
    if per_node is not None and per_node in env:
        each = _number(env, per_node)
        number = max(1, processes // each)
    else:
        number = _number(env, nodes) if nodes is not None else 1
        each = processes // number
    if each * number != processes:
        raise ConfigError(
            f"{launcher} has started {_count(processes, 'process')} on {_count(number, 'node')}: expected equally many on each "
            f"({size} is {processes})."
        )
    return Launch(launcher, processes, number)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        number = int(env[name])
    except (KeyError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"The environment variable {name} is {env.get(name)!r}: expected a number of 1 or more.")
    return number


def _count(number: int, what: str) -> str:
    plural = {"process": "processes"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"
