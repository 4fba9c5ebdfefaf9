"""What each number of the evidence means, in the order of tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """What a number means.

    Attributes:
        name: Key in :func:`evidence`.
        title: Head of its column.
        ideal: ``oracle``: what retrained models have; or a number.
        meaning: One sentence.
        percent: Whether tables show it in percent.
    """

    name: str
    title: str
    ideal: str
    meaning: str
    percent: bool = False


MEASURES: tuple[Measure, ...] = (
    Measure("ua", "UA", "oracle", "Share of the forget set that is answered wrongly.", True),
    Measure("ra", "RA", "oracle", "Accuracy on training images that stay.", True),
    Measure("ta", "TA", "oracle", "Accuracy on test images of classes that stay.", True),
    Measure("ta_forget", "TA(f)", "oracle", "Accuracy on test images of classes that went.", True),
    Measure("va", "VA", "oracle", "Accuracy on held-out images.", True),
    Measure(
        "mia_confidence",
        "MIA",
        "oracle",
        "Share of the forget set whose confidence looks like that of a test image.",
        True,
    ),
    Measure("avg_gap", "gap", "0", "Mean distance to the oracles in UA, RA, TA and MIA.", True),
    Measure("tow", "ToW", "1", "Closeness to the oracles in three accuracies, multiplied."),
    Measure("tow_mia", "ToW-MIA", "1", "The same with MIA in place of UA."),
    Measure("aus", "AUS", "oracle", "Test accuracy kept, divided by one plus what is known still."),
    Measure("aus_homogeneous", "AUS(HR)", "oracle", "The same, as for the removal of samples."),
    Measure("mia_loss", "loss attack", "0.5", "How often losses tell forgotten from other images."),
    Measure("mia_loss_gap", "loss gap", "0", "Distance of that from guessing."),
    Measure("mia_threshold", "threshold", "0.5", "How often one threshold tells forgotten images."),
    Measure(
        "mia_threshold_auc",
        "AUC",
        "0.5",
        "Chance that a forgotten image looks more like a member than another one.",
    ),
    Measure("mia_entropy", "entropy", "oracle", "Share of the forget set called members.", True),
    Measure("js_forget", "JS(f)", "0", "Divergence from the oracles on the forget set."),
    Measure("js_retain", "JS(r)", "0", "Divergence from the oracles on images that stay."),
    Measure("js_test", "JS(t)", "0", "Divergence from the oracles on test images."),
    Measure("activation_distance", "AD", "0", "Distance of probabilities on the forget set."),
    Measure("zrf", "ZRF", "oracle", "Likeness to an untrained network on the forget set."),
    Measure("cka", "CKA(f)", "oracle", "Likeness of embeddings of the forget set to the oracles'."),
    Measure("cka_test", "CKA(t)", "oracle", "The same on test images."),
    Measure("probe", "probe", "oracle", "How well a linear probe finds the class that went.", True),
    Measure("pra", "PRA", "oracle", "Forget accuracy that five examples bring back.", True),
    Measure("ain", "AIN", "1", "Steps to learn the forget set again, by those of an oracle."),
    Measure("lira_auc", "LiRA", "0.5", "Area under the curve of the likelihood-ratio attack."),
    Measure("lira_tpr", "LiRA@1%", "0.01", "Members that it finds at 1 % false alarms.", True),
    Measure("u_lira_auc", "U-LiRA", "0.5", "The same with shadow models that have unlearned."),
    Measure("u_lira_tpr", "U-LiRA@1%", "0.01", "Members that it finds at 1 % false alarms.", True),
    Measure("klom_forget", "KLOM(f)", "oracle", "Divergence of margins on the forget set."),
    Measure("klom_retain", "KLOM(r)", "oracle", "Divergence of margins on images that stay."),
    Measure("klom_validation", "KLOM(v)", "oracle", "Divergence of margins on held-out images."),
    Measure("challenge", "challenge", "oracle", "Score of the NeurIPS 2023 challenge."),
)
