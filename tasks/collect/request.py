"""What a user asks of collection."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.collect.environment import may_be_secret
from tasks.collect.plan import NodeGroup, Wish, read_arguments
from tasks.collect.session import Lengths, Traffic
from tasks.errors import InputError, first_problem
from tasks.manifest import DONE, KernelEntry, Route, RunManifest, slug_of
from tasks.request import for_the_form

_HELD = {
    "FLASHINFER_DUMP": "it says what FlashInfer records, and where",
    "FLASHINFER_LOG": "it says what FlashInfer records, and where",
    "CUDA_VISIBLE_DEVICES": "it names the GPUs that were leased",
    "CUDA_DEVICE_ORDER": "it numbers the GPUs that were leased",
    "PYTHONPATH": "the server is found by it; set it for onboard itself to add to it",
    "PYTHONUNBUFFERED": "the server's log is followed while it is written",
    "SGLANG_FLASHINFER_USE_PAGED": "it says which way of prefilling the session shows",
}
"""What names of variables begin with that sessions rest on -> why."""


class CollectRequest(BaseModel):
    """Workloads to collect by serving a model."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=for_the_form)

    manifest: Path = Field(description="The run manifest; the workspace is its folder.")
    definitions: tuple[str, ...] = Field(
        default=(), description="Definitions to collect for; all that have none yet if not given."
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        default=Traffic().batch_sizes, min_length=1, description="Requests at a time, wave by wave."
    )
    dataset_kind: Literal["random", "sharegpt"] = Field(
        default="random", description="What prompts are made of."
    )
    dataset_path: Path | None = Field(
        default=None, description="ShareGPT-format file, for dataset_kind sharegpt."
    )
    isl: int | None = Field(default=None, ge=1, description="Input length, with osl.")
    osl: int | None = Field(default=None, ge=1, description="Output length, with isl.")
    random_range_ratio: float = Field(default=Traffic().random_range_ratio, gt=0, le=1)
    rounds: int = Field(
        default=Traffic().rounds, ge=1, le=1000, description="Times each wave is sent."
    )
    seed: int = Field(default=0, description="The same seed gives the same requests.")
    model_path: str | None = Field(
        default=None, description="Folder or repository to serve instead of the manifest's."
    )
    config: Path | None = Field(
        default=None, description="A config.json file to plan by instead of the model's own."
    )
    server_flags: tuple[str, ...] = Field(
        default=(), description="More server arguments, such as '--load-format dummy'."
    )
    server_env: dict[str, str] = Field(default={}, description="More of the server's environment.")
    nnodes: int = Field(default=1, ge=1, description="Hosts that serve the model together.")
    node_rank: int = Field(default=0, ge=0, description="Which of them this one is.")
    dist_init_addr: str = Field(default="", description="host:port of the first of them.")
    all_layers: bool = Field(
        default=False, description="Record whole calls (norms, sampling, MoE) with every layer."
    )
    record_runs: bool = Field(
        default=False, description="Record attention's runs as well as its plans."
    )
    keep_dumps: bool = Field(
        default=False, description="Keep FlashInfer's dumps; disk is not bound."
    )
    max_workloads: int | None = Field(
        default=None, ge=1, le=10_000, description="Rows per definition at most."
    )
    skip_evaluation: bool = Field(default=False, description="Do not evaluate the baselines.")
    sessions_only: bool = Field(
        default=False, description="Serve and record; the rows are made elsewhere, or later."
    )

    @property
    def model_slug(self) -> str:
        """The model that the manifest is named for."""
        return slug_of(self.manifest)

    @model_validator(mode="after")
    def _together(self) -> CollectRequest:
        if (self.isl is None) != (self.osl is None):
            raise ValueError("isl, osl: give both or none")
        self._check_nodes()
        secret = next((name for name in self.server_env if may_be_secret(name)), None)
        if secret is not None:
            raise ValueError(
                f"server_env: {secret} would be shown and stored; give the Hub's token as "
                "ONBOARD_HF_TOKEN"
            )
        for name in self.server_env:
            why = next((why for held, why in _HELD.items() if name.startswith(held)), None)
            if why is not None:
                raise ValueError(f"server_env: {name} is decided by the session: {why}")
        if (self.dataset_kind == "sharegpt") != (self.dataset_path is not None):
            raise ValueError("dataset_path: is for, and needed by, dataset_kind sharegpt")
        return self

    def _check_nodes(self) -> None:
        address = self.dist_init_addr
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"node_rank: {self.node_rank} is not one of {self.nnodes} nodes")
        if self.nnodes > 1 and not address:
            raise ValueError(f"dist_init_addr: missing; {self.nnodes} nodes need it")
        if self.nnodes == 1 and address:
            raise ValueError("dist_init_addr: is for several nodes (nnodes)")
        port = re.fullmatch(r"[A-Za-z0-9\[][\w.:\[\]-]*:(\d{1,5})", address, re.ASCII)
        if address and not (port and 0 < int(port[1]) < 1 << 16):
            raise ValueError(f"dist_init_addr: {address!r} is not host:port")

    @property
    def traffic(self) -> Traffic:
        """The requests to send."""
        pair = {}
        if self.isl is not None and self.osl is not None:
            pair = {"lengths": (Lengths(isl=self.isl, osl=self.osl),)}
        return Traffic(
            kind=self.dataset_kind,
            dataset=self.dataset_path,
            random_range_ratio=self.random_range_ratio,
            batch_sizes=tuple(sorted(set(self.batch_sizes))),
            rounds=self.rounds,
            seed=self.seed,
            **pair,
        )

    def wish(self, run: RunManifest) -> Wish:
        """Return what the sessions' plan is made from.

        Raises:
            InputError: neither the request nor the manifest says what to serve.
        """
        model = self.model_path or run.hf_repo_id
        if model is None:
            raise InputError(f"{self.manifest}: field hf_repo_id: missing; give --model-path")
        return Wish(
            model=model,
            traffic=self.traffic,
            flags=read_arguments(self.server_flags),
            env=self.server_env,
            nodes=NodeGroup(self.nnodes, self.node_rank, self.dist_init_addr),
            all_layers=self.all_layers,
            record_runs=self.record_runs,
        )

    def chosen(self, run: RunManifest) -> list[KernelEntry]:
        """Return the kernels to collect for: those named, or all that SGLang calls and have none.

        Raises:
            InputError: a name is not the manifest's, or nothing of it can be collected.
        """
        if not self.definitions:
            return [
                entry
                for entry in run.kernels
                if entry.route is Route.COLLECT and entry.phase3_status != DONE
            ]
        known = {entry.definition_name: entry for entry in run.kernels}
        unknown = [name for name in self.definitions if name not in known]
        if unknown:
            raise InputError(f"--definitions: {self.manifest} has no {', '.join(unknown)}")
        chosen = [known[name] for name in dict.fromkeys(self.definitions)]
        for entry in chosen:
            if entry.spec is None:
                raise InputError(
                    f"--definitions: {entry.definition_name} is {entry.phase1_status}: nothing is "
                    "known of how it is called"
                )
        return chosen


def parse_request(**fields: Any) -> CollectRequest:
    """Build a request from a command's options.

    Raises:
        InputError: one of them is wrong; the message names the option.
    """
    try:
        return CollectRequest(**fields)
    except ValidationError as error:
        field, reason = first_problem(error)
        named, said, rest = reason.partition(": ")
        named, rest = (named, rest) if said and not field else (field, reason)
        names = [name.partition(".")[0] for name in named.split(", ")]
        if not set(names) <= CollectRequest.model_fields.keys():
            raise InputError(reason) from error
        raise InputError(f"{', '.join(map(_option, names))}: {rest}") from error


def _option(field: str) -> str:
    """Return a field as the command spells it."""
    return f"--{field.replace('_', '-').replace('flags', 'flag')}"
