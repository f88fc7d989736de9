"""The peers by name, each at its published defaults."""

from __future__ import annotations

from collections.abc import Callable

from agent.bench.peers import Peer
from agent.bench.peers.bn import BN
from agent.bench.peers.cotta import CoTTA
from agent.bench.peers.logit_centering import LogitCentering
from agent.bench.peers.rdumb import RDumb
from agent.bench.peers.roid import ROID
from agent.bench.peers.sar import SAR
from agent.bench.peers.single_prompt import SinglePrompt
from agent.bench.peers.tda import TDA
from agent.bench.peers.tent import Tent
from agent.bench.peers.tfup import TFUP
from agent.bench.peers.tpt import TPT
from agent.bench.peers.vdp import VDP

PEERS: dict[str, Callable[..., Peer]] = {
    peer.name: peer
    for peer in (
        *(SinglePrompt, BN, LogitCentering, TDA, TFUP),
        *(Tent, RDumb, ROID, SAR, TPT, VDP, CoTTA),
    )
}
