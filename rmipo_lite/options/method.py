"""The options that say which method a run trains with, and what it says of them by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rmipo_lite.methods import table
from rmipo_lite.methods.formulas import MethodOptions
from rmipo_lite.methods.table import Method, methods_with
from rmipo_lite.ops.losses import PairOptions

ReferenceMode = Literal["cached", "live"]
PriorContext = Literal["auto", "none", "bos"]
LengthBalanceMode = Literal["auto", "off"]


def described(default: Any, text: str) -> Any:
    """A field with its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class MethodFields:
    """The method's part of `RMiPOConfig`; None where a method has its own default, or none."""

    # The method (formulas and defaults of every method: methods/, ops/losses.py)
    loss_type: str = described("rmipo", f"Method: {', '.join(table.methods())}.")
    beta: float = described(
        None, "Scale of the log-probability gap, > 0; None: the method's own (rmipo 2, dpo 0.1)."
    )
    gamma_min: float = described(
        0.3, "rmipo: smallest target margin, reached at a large PMI gap, reward units."
    )
    gamma_max: float = described(
        1.6, "rmipo: largest target margin, at a PMI gap of 0 or below, reward units."
    )
    gamma_scaled_by_beta: bool = described(
        False,
        "rmipo, with d = logps_chosen - logps_rejected: False is the paper's "
        "sigma(beta*d - gamma); True the authors' released code's sigma(beta*(d - gamma)), where "
        "gamma is in nats per token.",
    )
    simpo_gamma: float | None = described(
        None,
        f"{methods_with('simpo_gamma')}: constant target margin outside beta, reward units; None: "
        "0.5, alphapo 0.1, alpha_dpo and gamma_* 4.",
    )
    gamma_beta_ratio: float | None = described(
        None,
        f"{methods_with('simpo_gamma')}: the margin as a share of beta, as SimPO's code has it.",
    )
    label_smoothing: float | None = described(
        None,
        f"{methods_with('label_smoothing')}: assumed share of swapped labels, in [0, 0.5); None: "
        "0, robust 0.1.",
    )
    alpha: float | None = described(
        None,
        f"{methods_with('alpha')}: alphapo's power of the probability (None: 0.25), r_dpo's reward "
        "for a token that the chosen side is longer (None: 0.05), alpha_dpo's weight of the change "
        "from the reference (None: 0.05), beta_dpo's of the gap in beta (None: 0.6).",
    )
    dpop_lambda: float | None = described(
        None, "dpop: weight of the penalty below the reference; None: 0.1."
    )
    slic_delta: float | None = described(None, "slic: the margin, nats; None: 1.")
    beta_dpo_rho: float | None = described(
        None, "beta_dpo: share of a step's pairs that is left out, in [0, 1); None: 0.2."
    )
    gamma_po_tau: float | None = described(
        None,
        f"{methods_with('gamma_po_tau')}: how near to each other margins are held; None: 10.",
    )
    epsilon: float | None = described(
        None, "epsilon_dpo: size of the step to and from the reference, in (0, 1); None: 0.01."
    )
    length_norm: bool | None = described(
        None, "gamma_dpo: gaps of means over tokens, or of sums; None: True."
    )
    desirable_weight: float | None = described(
        None, "kto: weight of the rows whose label is true; None: 1."
    )
    undesirable_weight: float | None = described(
        None, "kto: weight of the rows whose label is false; None: 1."
    )
    ref_sync_steps: int | None = described(
        None,
        "Methods with a reference: after so many steps it moves towards the model (TR-DPO; its "
        "authors: 512); None: it stays.",
    )
    ref_sync_alpha: float = described(
        0.6, "How far it moves, in (0, 1]: reference = alpha model + (1 - alpha) reference."
    )
    ld_alpha: float | None = described(
        None,
        "Methods of sums: how much a token counts past the length that both sides have, 0 to 1 "
        "(LD-DPO); None: as any other.",
    )
    sft_weight: float = described(
        None,
        "Weight of the mean negative log-probability per chosen token (nats per token, mean over "
        "all chosen tokens of the optimizer step), >= 0: it keeps the wording whole and holds the "
        "chosen side up, which a preference loss doesn't see. 0: the preference loss alone. None: "
        "0.5; the method's own where it has one (orpo and cpo 1, slic 0.1), else 0 beside dpo and "
        "its kind.",
    )
    length_balance: LengthBalanceMode = described(
        None,
        "auto: pairs that length alone explains weigh less, so that length no longer tells chosen "
        "from rejected (weights from the token counts, where the chosen side tends to be the "
        "longer one); off: all pairs weigh alike, for data where longer is rightly preferred. "
        "None: auto, off beside dpo and its kind.",
    )
    end_anchor: float = described(
        None,
        "Weight of the likelihood of where the chosen response ends, per nat of a response, >= 0: "
        "the end is learnt from it rather than as a by-product of the lengths. 0: off. None: 0.1, "
        "0 beside dpo and its kind.",
    )
    reference: ReferenceMode = described(
        "cached",
        "Methods with a reference model, which is the model as it came to the run: cached scores "
        "every pair by it once before training; live at every step.",
    )
    prior: str = described(
        "live",
        "rmipo: live scores the bare response under the current policy at every step (exact); "
        "cached scores it once before training: an approximation whose gamma drifts away, by "
        "0.06-0.11 at learning rate 1e-4 and 0.4-0.6 at 1e-3 within 150 steps of a 260K-parameter "
        "model; refresh:K scores a pair when it comes up and what is known of it is K steps old, "
        "which is live until a pair comes again.",
    )
    prior_context: PriorContext = described(
        "auto",
        "rmipo: what stands in front of a bare response. bos: the tokenizer's BOS, every token is "
        "scored; none: nothing, from the second token on, as the authors; auto: what the tokenizer "
        "itself puts in front of a text, which is what no prompt means to the model.",
    )

    @property
    def loss(self) -> Method:
        """The table's entry of `loss_type`."""
        return table.method_named(self.loss_type)

    @property
    def prior_refresh(self) -> int | None:
        """Steps after which a pair's prior is scored again, of `prior="refresh:K"`."""
        head, _, steps = self.prior.partition(":")
        return int(steps) if head == "refresh" else None

    @property
    def pair_options(self) -> PairOptions:
        """The constants of a loss of means."""
        return PairOptions(*(getattr(self, name) for name in PairOptions._fields))

    @property
    def method_options(self) -> MethodOptions:
        """The constants of a loss of sums; those it hasn't are 0."""
        values: Any = (getattr(self, name) or 0.0 for name in MethodOptions._fields)
        return MethodOptions(*values)

    @property
    def reference_goes_on(self) -> bool:
        """Whether the reference scores pairs during training too, so that its weights are kept."""
        asked = self.reference == "live" or bool(self.ref_sync_steps) or self.loss.needs_logits
        return self.loss.needs_reference and asked

    @property
    def uses_prior(self) -> bool:
        """Whether the loss needs the response scored without its prompt."""
        return self.loss.needs_prior
