"""bertner fine-tunes BERT for named entity recognition.

The parts are imported by name, so that this package itself costs nothing to import::

    from bertner.model import BertForNER
    from bertner.loop import train, evaluate
    from bertner.predict import Tagger
"""

__version__ = "0.1.0"
