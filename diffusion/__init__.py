"""Text-to-image diffusion: UnlearnCanvas, and any concept of any pipeline.

This file only lists what the modality offers, as lazy targets, so that `mmforget list` stays light.
"""

_D = "mmforget.diffusion"

ENTRIES: dict[str, dict[str, str]] = {
    "benchmarks": {
        "diffusion/unlearncanvas": f"{_D}.benchmarks.unlearncanvas:UnlearnCanvas",
        "diffusion/concept": f"{_D}.benchmarks.concept:AnyConcept",
        "diffusion/unlearndiffatk": f"{_D}.benchmarks.unlearndiffatk:UnlearnDiffAtk",
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
    "attacks": {
        "diffusion/text_grad": f"{_D}.attacks.text_grad:TextGrad",
        "diffusion/hard_prompt": f"{_D}.attacks.hard_prompt:HardPrompt",
        "diffusion/p4d": f"{_D}.attacks.p4d:P4D",
        "diffusion/random": f"{_D}.attacks.random_tokens:RandomTokens",
        "diffusion/seed_search": f"{_D}.attacks.seed_search:SeedSearch",
        "diffusion/no_attack": f"{_D}.attacks.no_attack:NoAttack",
        "diffusion/ring_a_bell": f"{_D}.attacks.ring_a_bell:RingABell",
        "diffusion/mma": f"{_D}.attacks.mma:MMA",
        "diffusion/transfer": f"{_D}.attacks.transfer:Transfer",
        "diffusion/concept_inversion": f"{_D}.attacks.concept_inversion:ConceptInversion",
        "diffusion/completion": f"{_D}.attacks.probes:Completion",
        "diffusion/img2img": f"{_D}.attacks.probes:Img2Img",
        "diffusion/noise": f"{_D}.attacks.probes:NoiseProbe",
        "diffusion/benign_finetune": f"{_D}.attacks.finetune:BenignFinetune",
        "diffusion/fewshot_relearn": f"{_D}.attacks.finetune:FewShotRelearn",
    },
    "openers": {
        "diffusion/pipeline": f"{_D}.attacks.opener:pipeline_folder",
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
