"""Errors for people: each message says what was wrong, where, and what to do about it."""


class InterleafError(Exception):
    """Anything a user can put right; the CLI prints it as one line and exits with code 2."""


class ConfigError(InterleafError):
    """A setting that is unknown, contradictory or out of range."""


class SiteError(InterleafError):
    """An adapter that would be attached nowhere, or somewhere it does not fit."""


class AdapterError(InterleafError):
    """An adapter name that is unknown, taken, or used in a way its kind does not allow."""


class StoreError(InterleafError):
    """An adapter folder that is missing, damaged, in the way, or made for another base."""


class DataError(InterleafError):
    """Data that is missing, empty, or not of the form that the task needs."""


class BaseModelError(InterleafError):
    """A pretrained model or tokenizer that cannot be found or used."""


class TrainingError(InterleafError):
    """A training run that cannot go on, for example after a NaN loss."""


class SandboxError(InterleafError):
    """A machine, or a limit asked for, with which programs cannot be run safely."""
