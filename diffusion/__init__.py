"""Text-to-image diffusion: UnlearnCanvas, and any concept of any pipeline.

This file only lists what the modality offers, as lazy targets, so that `mmforget list` stays light.
"""

_D = "mmforget.diffusion"

ENTRIES: dict[str, dict[str, str]] = {
    "benchmarks": {
        "diffusion/unlearncanvas": f"{_D}.benchmarks.unlearncanvas:UnlearnCanvas",
        "diffusion/concept": f"{_D}.benchmarks.concept:AnyConcept",
    },
    "methods": {
        "diffusion/esd": f"{_D}.methods.esd:ESD",
        "diffusion/uce": f"{_D}.methods.uce:UCE",
        "diffusion/ca": f"{_D}.methods.ca:CA",
        "diffusion/fmn": f"{_D}.methods.fmn:ForgetMeNot",
        "diffusion/relabel": f"{_D}.methods.salun:Relabel",
        "diffusion/salun": f"{_D}.methods.salun:DiffusionSalUn",
        "diffusion/ediff": f"{_D}.methods.ediff:EraseDiff",
        "diffusion/shs": f"{_D}.methods.shs:ScissorHands",
        "diffusion/spm": f"{_D}.methods.spm:SPM",
        "diffusion/receler": f"{_D}.methods.receler:Receler",
        "diffusion/mace": f"{_D}.methods.mace:MACE",
        "diffusion/rece": f"{_D}.methods.rece:RECE",
        "diffusion/advunlearn": f"{_D}.methods.advunlearn:AdvUnlearn",
        "diffusion/sae": f"{_D}.methods.sae:SAeUron",
        "diffusion/seot": f"{_D}.methods.seot:SEOT",
        "diffusion/sld": f"{_D}.methods.sld:SLD",
        "diffusion/negative_prompt": f"{_D}.methods.negative_prompt:NegativePrompting",
    },
    "metrics": {
        "diffusion/unlearncanvas": f"{_D}.metrics.unlearncanvas:CanvasScores",
        "diffusion/distances": f"{_D}.metrics.distances:Distances",
        "diffusion/drift": f"{_D}.metrics.drift:Drift",
        "diffusion/neighbours": f"{_D}.metrics.neighbours:Neighbours",
        "diffusion/storage": f"{_D}.metrics.storage:Storage",
        "diffusion/clip": f"{_D}.metrics.clip:ClipScore",
        "diffusion/judged": f"{_D}.metrics.judged:Judged",
        "diffusion/imagenette": f"{_D}.metrics.judged:ImageNetteObjects",
    },
}
