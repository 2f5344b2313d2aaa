"""Remove a transformer's LayerNorms, and read its logits as exact sums of parts.

    import lnfree_interp as lf

    model = lf.load("gpt2")
    run = lf.remove_norms(model, lf.recipes.distilled(model), data)
    free = lf.fold(run.model)
    lf.attribute_logits(free, "The Eiffel Tower is in", " Paris", by="head").verify()

The names below are imported on first use: `import lnfree_interp` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lnfree_interp import errors, plots
    from lnfree_interp.analysis import parts
    from lnfree_interp.analysis.affine import AffineMap, affine_map
    from lnfree_interp.analysis.attribute import (
        attribute,
        attribute_logits,
        attribute_neuron,
        attribute_next_tokens,
    )
    from lnfree_interp.analysis.averages import MeanContributions, mean_next_token_attribution
    from lnfree_interp.analysis.certificates import Certificate, certificate_table
    from lnfree_interp.analysis.components import Component
    from lnfree_interp.analysis.counterfactual import CounterfactualPattern, counterfactual_pattern
    from lnfree_interp.analysis.effects import Effects
    from lnfree_interp.analysis.flow import flow_graph
    from lnfree_interp.analysis.flow_results import FlowGraph
    from lnfree_interp.analysis.gauge import GaugeReport, gauge_check, random_gauge
    from lnfree_interp.analysis.interventions import Intervention, ablate
    from lnfree_interp.analysis.lens import Lens, logit_lens
    from lnfree_interp.analysis.levels import Level, level
    from lnfree_interp.analysis.logit_targets import Logit, LogitDifference, NextTokens
    from lnfree_interp.analysis.neurons import Flips, flip_distances
    from lnfree_interp.analysis.norms_read import norms_read
    from lnfree_interp.analysis.paths import expand_paths
    from lnfree_interp.analysis.residual import decompose_residual
    from lnfree_interp.analysis.results import Contributions, load_result
    from lnfree_interp.analysis.score_targets import LogOdds, Score
    from lnfree_interp.analysis.scores import ScoreAttribution, attribute_scores
    from lnfree_interp.analysis.stream import Place
    from lnfree_interp.analysis.targets import Neuron, Probe, Target
    from lnfree_interp.analysis.trace import Trace, trace
    from lnfree_interp.analysis.weights import (
        TokenTable,
        bigram_table,
        neuron_input_table,
        neuron_output_table,
        ov_table,
        qk_table,
        virtual_weights,
    )
    from lnfree_interp.bundled import bundled_checkpoint, smollm2
    from lnfree_interp.checkpoints import formats
    from lnfree_interp.checkpoints.converting import convert
    from lnfree_interp.checkpoints.exporting import export, export_adapter
    from lnfree_interp.checkpoints.loading import load
    from lnfree_interp.data.mixed import MixedSequences
    from lnfree_interp.data.named import evaluation_text, tokens_seen, without_tokens
    from lnfree_interp.data.packing import pack
    from lnfree_interp.data.sampled import sample_text
    from lnfree_interp.data.sources import open_sequences
    from lnfree_interp.data.stdlib import stdlib_corpus
    from lnfree_interp.evaluation.certify import certify
    from lnfree_interp.evaluation.component_change import ComponentChange, component_change
    from lnfree_interp.evaluation.confidence_neurons import (
        NeuronAblation,
        ablate_neurons,
        find_confidence_neurons,
    )
    from lnfree_interp.evaluation.deletion import deletion_check
    from lnfree_interp.evaluation.deletion_results import DeletionCheck
    from lnfree_interp.evaluation.depth import DepthReport, depth_report
    from lnfree_interp.evaluation.direct_effects import (
        Additivity,
        DirectEffects,
        direct_effect_additivity,
        direct_effects,
    )
    from lnfree_interp.evaluation.evaluate import evaluate
    from lnfree_interp.evaluation.gradients import GradientBalance, gradient_balance
    from lnfree_interp.evaluation.loss import CrossEntropy, evaluate_loss
    from lnfree_interp.evaluation.patching import (
        Patching,
        corrupted_pairs,
        ioi_pairs,
        patch_residual,
    )
    from lnfree_interp.evaluation.results import Evaluation
    from lnfree_interp.evaluation.tasks import as_harness_model, run_tasks
    from lnfree_interp.models.agreement import compare_logits, measured_agreement
    from lnfree_interp.models.fixed_point import FixedPoint, fixed_point
    from lnfree_interp.models.forms import fold, frozen_form
    from lnfree_interp.models.integer_mode import integer_arithmetic
    from lnfree_interp.models.integer_operations import IntegerOperations, integer_operations
    from lnfree_interp.models.site_names import NormSite
    from lnfree_interp.models.sites import (
        freeze_site,
        get_norm,
        list_norm_sites,
        list_scalers,
        live_sites,
        with_norm_sites,
    )
    from lnfree_interp.models.untrained import untrained
    from lnfree_interp.models.weight_components import WeightComponent, list_weight_components
    from lnfree_interp.numerics import MeasuredError
    from lnfree_interp.probing.features import word_features
    from lnfree_interp.probing.fit import fit_probe, fit_probes
    from lnfree_interp.probing.fitted import FittedProbe
    from lnfree_interp.probing.reading_times import (
        ReadingTimes,
        planted_reading_times,
        read_reading_times,
    )
    from lnfree_interp.probing.sentences import Sentence, WordTokens, word_tokens
    from lnfree_interp.removal import recipes
    from lnfree_interp.removal.freeze_for import FrozenFor, freeze_for
    from lnfree_interp.removal.recipe import Recipe
    from lnfree_interp.removal.remove import remove_norms
    from lnfree_interp.removal.run import Run
    from lnfree_interp.removal.runaways import thaw_runaways
    from lnfree_interp.removal.schedule import Event, Ramp
    from lnfree_interp.removal.sensitivity import SiteSensitivity, site_sensitivity
    from lnfree_interp.removal.settings import Guard, Release, Special, Statistics, Wait
    from lnfree_interp.removal.training import finetune, train
    from lnfree_interp.tuning.bank_evaluation import BankEvaluation, forgetting
    from lnfree_interp.tuning.banks import NormBanks
    from lnfree_interp.tuning.fisher import (
        FisherInformation,
        fisher_information,
        fisher_subset,
    )
    from lnfree_interp.tuning.parameter_mask import ParameterMask
    from lnfree_interp.tuning.selection import random_subset, select_parameters
    from lnfree_interp.tuning.transfer import Transfer, TransferredTensor, transfer_weights
    from lnfree_interp.variants.attention import to_linear_attention
    from lnfree_interp.variants.placing import (
        magneto_init,
        to_normformer,
        to_peri_ln,
        to_sub_ln,
    )
    from lnfree_interp.variants.replacing import to_derf, to_dyt, to_layernorm_scaling, to_map
    from lnfree_interp.variants.rms import to_crms, to_rms
    from lnfree_interp.variants.variant import Variant

# Where each public name lives; the imports above are the same table for type checkers.
_HOME = {
    "AffineMap": "lnfree_interp.analysis.affine",
    "affine_map": "lnfree_interp.analysis.affine",
    "attribute": "lnfree_interp.analysis.attribute",
    "attribute_logits": "lnfree_interp.analysis.attribute",
    "attribute_neuron": "lnfree_interp.analysis.attribute",
    "attribute_next_tokens": "lnfree_interp.analysis.attribute",
    "MeanContributions": "lnfree_interp.analysis.averages",
    "mean_next_token_attribution": "lnfree_interp.analysis.averages",
    "Certificate": "lnfree_interp.analysis.certificates",
    "certificate_table": "lnfree_interp.analysis.certificates",
    "Component": "lnfree_interp.analysis.components",
    "CounterfactualPattern": "lnfree_interp.analysis.counterfactual",
    "counterfactual_pattern": "lnfree_interp.analysis.counterfactual",
    "FlowGraph": "lnfree_interp.analysis.flow_results",
    "flow_graph": "lnfree_interp.analysis.flow",
    "GaugeReport": "lnfree_interp.analysis.gauge",
    "gauge_check": "lnfree_interp.analysis.gauge",
    "random_gauge": "lnfree_interp.analysis.gauge",
    "Effects": "lnfree_interp.analysis.effects",
    "Intervention": "lnfree_interp.analysis.interventions",
    "ablate": "lnfree_interp.analysis.interventions",
    "Lens": "lnfree_interp.analysis.lens",
    "logit_lens": "lnfree_interp.analysis.lens",
    "Level": "lnfree_interp.analysis.levels",
    "level": "lnfree_interp.analysis.levels",
    "Flips": "lnfree_interp.analysis.neurons",
    "flip_distances": "lnfree_interp.analysis.neurons",
    "norms_read": "lnfree_interp.analysis.norms_read",
    "expand_paths": "lnfree_interp.analysis.paths",
    "decompose_residual": "lnfree_interp.analysis.residual",
    "Contributions": "lnfree_interp.analysis.results",
    "load_result": "lnfree_interp.analysis.results",
    "ScoreAttribution": "lnfree_interp.analysis.scores",
    "attribute_scores": "lnfree_interp.analysis.scores",
    "Logit": "lnfree_interp.analysis.logit_targets",
    "LogitDifference": "lnfree_interp.analysis.logit_targets",
    "LogOdds": "lnfree_interp.analysis.score_targets",
    "Neuron": "lnfree_interp.analysis.targets",
    "NextTokens": "lnfree_interp.analysis.logit_targets",
    "Probe": "lnfree_interp.analysis.targets",
    "Score": "lnfree_interp.analysis.score_targets",
    "Target": "lnfree_interp.analysis.targets",
    "Trace": "lnfree_interp.analysis.trace",
    "trace": "lnfree_interp.analysis.trace",
    "Place": "lnfree_interp.analysis.stream",
    "TokenTable": "lnfree_interp.analysis.weights",
    "bigram_table": "lnfree_interp.analysis.weights",
    "neuron_input_table": "lnfree_interp.analysis.weights",
    "neuron_output_table": "lnfree_interp.analysis.weights",
    "ov_table": "lnfree_interp.analysis.weights",
    "qk_table": "lnfree_interp.analysis.weights",
    "virtual_weights": "lnfree_interp.analysis.weights",
    "bundled_checkpoint": "lnfree_interp.bundled",
    "smollm2": "lnfree_interp.bundled",
    "convert": "lnfree_interp.checkpoints.converting",
    "export": "lnfree_interp.checkpoints.exporting",
    "export_adapter": "lnfree_interp.checkpoints.exporting",
    "load": "lnfree_interp.checkpoints.loading",
    "MixedSequences": "lnfree_interp.data.mixed",
    "evaluation_text": "lnfree_interp.data.named",
    "tokens_seen": "lnfree_interp.data.named",
    "without_tokens": "lnfree_interp.data.named",
    "pack": "lnfree_interp.data.packing",
    "sample_text": "lnfree_interp.data.sampled",
    "open_sequences": "lnfree_interp.data.sources",
    "stdlib_corpus": "lnfree_interp.data.stdlib",
    "certify": "lnfree_interp.evaluation.certify",
    "ComponentChange": "lnfree_interp.evaluation.component_change",
    "component_change": "lnfree_interp.evaluation.component_change",
    "NeuronAblation": "lnfree_interp.evaluation.confidence_neurons",
    "ablate_neurons": "lnfree_interp.evaluation.confidence_neurons",
    "find_confidence_neurons": "lnfree_interp.evaluation.confidence_neurons",
    "deletion_check": "lnfree_interp.evaluation.deletion",
    "DeletionCheck": "lnfree_interp.evaluation.deletion_results",
    "DepthReport": "lnfree_interp.evaluation.depth",
    "depth_report": "lnfree_interp.evaluation.depth",
    "Additivity": "lnfree_interp.evaluation.direct_effects",
    "direct_effect_additivity": "lnfree_interp.evaluation.direct_effects",
    "DirectEffects": "lnfree_interp.evaluation.direct_effects",
    "direct_effects": "lnfree_interp.evaluation.direct_effects",
    "Evaluation": "lnfree_interp.evaluation.results",
    "evaluate": "lnfree_interp.evaluation.evaluate",
    "GradientBalance": "lnfree_interp.evaluation.gradients",
    "gradient_balance": "lnfree_interp.evaluation.gradients",
    "CrossEntropy": "lnfree_interp.evaluation.loss",
    "Patching": "lnfree_interp.evaluation.patching",
    "corrupted_pairs": "lnfree_interp.evaluation.patching",
    "ioi_pairs": "lnfree_interp.evaluation.patching",
    "patch_residual": "lnfree_interp.evaluation.patching",
    "as_harness_model": "lnfree_interp.evaluation.tasks",
    "run_tasks": "lnfree_interp.evaluation.tasks",
    "evaluate_loss": "lnfree_interp.evaluation.loss",
    "compare_logits": "lnfree_interp.models.agreement",
    "measured_agreement": "lnfree_interp.models.agreement",
    "WeightComponent": "lnfree_interp.models.weight_components",
    "list_weight_components": "lnfree_interp.models.weight_components",
    "FixedPoint": "lnfree_interp.models.fixed_point",
    "fixed_point": "lnfree_interp.models.fixed_point",
    "fold": "lnfree_interp.models.forms",
    "frozen_form": "lnfree_interp.models.forms",
    "integer_arithmetic": "lnfree_interp.models.integer_mode",
    "IntegerOperations": "lnfree_interp.models.integer_operations",
    "integer_operations": "lnfree_interp.models.integer_operations",
    "NormSite": "lnfree_interp.models.site_names",
    "freeze_site": "lnfree_interp.models.sites",
    "get_norm": "lnfree_interp.models.sites",
    "list_norm_sites": "lnfree_interp.models.sites",
    "list_scalers": "lnfree_interp.models.sites",
    "live_sites": "lnfree_interp.models.sites",
    "with_norm_sites": "lnfree_interp.models.sites",
    "untrained": "lnfree_interp.models.untrained",
    "MeasuredError": "lnfree_interp.numerics",
    "word_features": "lnfree_interp.probing.features",
    "fit_probe": "lnfree_interp.probing.fit",
    "fit_probes": "lnfree_interp.probing.fit",
    "FittedProbe": "lnfree_interp.probing.fitted",
    "ReadingTimes": "lnfree_interp.probing.reading_times",
    "planted_reading_times": "lnfree_interp.probing.reading_times",
    "read_reading_times": "lnfree_interp.probing.reading_times",
    "Sentence": "lnfree_interp.probing.sentences",
    "WordTokens": "lnfree_interp.probing.sentences",
    "word_tokens": "lnfree_interp.probing.sentences",
    "Guard": "lnfree_interp.removal.settings",
    "Recipe": "lnfree_interp.removal.recipe",
    "Release": "lnfree_interp.removal.settings",
    "Special": "lnfree_interp.removal.settings",
    "Statistics": "lnfree_interp.removal.settings",
    "Wait": "lnfree_interp.removal.settings",
    "Run": "lnfree_interp.removal.run",
    "Event": "lnfree_interp.removal.schedule",
    "Ramp": "lnfree_interp.removal.schedule",
    "remove_norms": "lnfree_interp.removal.remove",
    "BankEvaluation": "lnfree_interp.tuning.bank_evaluation",
    "forgetting": "lnfree_interp.tuning.bank_evaluation",
    "NormBanks": "lnfree_interp.tuning.banks",
    "FisherInformation": "lnfree_interp.tuning.fisher",
    "fisher_information": "lnfree_interp.tuning.fisher",
    "fisher_subset": "lnfree_interp.tuning.fisher",
    "ParameterMask": "lnfree_interp.tuning.parameter_mask",
    "random_subset": "lnfree_interp.tuning.selection",
    "select_parameters": "lnfree_interp.tuning.selection",
    "Transfer": "lnfree_interp.tuning.transfer",
    "TransferredTensor": "lnfree_interp.tuning.transfer",
    "transfer_weights": "lnfree_interp.tuning.transfer",
    "FrozenFor": "lnfree_interp.removal.freeze_for",
    "freeze_for": "lnfree_interp.removal.freeze_for",
    "SiteSensitivity": "lnfree_interp.removal.sensitivity",
    "thaw_runaways": "lnfree_interp.removal.runaways",
    "site_sensitivity": "lnfree_interp.removal.sensitivity",
    "finetune": "lnfree_interp.removal.training",
    "train": "lnfree_interp.removal.training",
    "magneto_init": "lnfree_interp.variants.placing",
    "to_linear_attention": "lnfree_interp.variants.attention",
    "to_normformer": "lnfree_interp.variants.placing",
    "to_peri_ln": "lnfree_interp.variants.placing",
    "to_sub_ln": "lnfree_interp.variants.placing",
    "to_derf": "lnfree_interp.variants.replacing",
    "to_dyt": "lnfree_interp.variants.replacing",
    "to_layernorm_scaling": "lnfree_interp.variants.replacing",
    "to_map": "lnfree_interp.variants.replacing",
    "to_crms": "lnfree_interp.variants.rms",
    "to_rms": "lnfree_interp.variants.rms",
    "Variant": "lnfree_interp.variants.variant",
}

_MODULES = {
    "errors": "lnfree_interp.errors",
    "parts": "lnfree_interp.analysis.parts",
    "formats": "lnfree_interp.checkpoints.formats",
    "plots": "lnfree_interp.plots",
    "recipes": "lnfree_interp.removal.recipes",
}

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ImportError as error:
            if "HookedTransformer" not in str(error):
                raise
            from lnfree_interp.errors import UnsupportedModelError
            from lnfree_interp.models.running import BRIDGE

            raise UnsupportedModelError(f"lf.{name}: {BRIDGE}") from error
    raise AttributeError(f"module 'lnfree_interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
