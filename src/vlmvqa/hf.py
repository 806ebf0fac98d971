"""`import vlmvqa.hf` registers this project's models with transformers' Auto classes (docs/ecosystem.md).

`AutoConfig`, `AutoProcessor`, `AutoModelForImageTextToText` and `pipeline` then load the folder of a saved `VLM`.
Models of transformers that were fine-tuned here need no registration.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmvqa.extras.hf.config import VlmvqaConfig
from vlmvqa.extras.hf.model import VlmvqaForConditionalGeneration
from vlmvqa.extras.hf.processor import VlmvqaProcessor

__all__ = ["VlmvqaConfig", "VlmvqaForConditionalGeneration", "VlmvqaProcessor"]

AutoConfig.register(VlmvqaConfig.model_type, VlmvqaConfig, exist_ok=True)
AutoProcessor.register(VlmvqaConfig, VlmvqaProcessor, exist_ok=True)
AutoModelForImageTextToText.register(VlmvqaConfig, VlmvqaForConditionalGeneration, exist_ok=True)
# The pipeline compares names with this table only, and would log an error.
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[VlmvqaConfig.model_type] = VlmvqaForConditionalGeneration.__name__
