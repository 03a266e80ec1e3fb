"""What can go wrong between a trainer, a shard and a replica.

ParamServerError
├── AddressError       an address cannot be bound or may not be used
├── ManifestError      a manifest is malformed or contradicts itself
├── LogError           the log's store is not usable
│   ├── LogDamageError   a committed record is torn, rotten or missing
│   ├── StoreExistsError  an object that is to be created is there already
│   └── StoreMissingError an object is not in the store
├── FencedError        a newer generation has been opened: this writer must stop
├── GapError           a version does not follow the head
├── ConflictError      the same version or blob was committed with other content
├── MissingBlobError   a commit names a blob that is not there: publish the version again
├── BadBlobError       a blob is damaged or breaks its format
├── LimitError         a bound on size or number would be passed
├── RequestError       a prediction request is wrong: the message names the input
├── UnknownModelError  the replica serves another model
├── AccessError        a credential is missing, wrong or unreadable
├── ConfigError        a configuration file or argument is wrong
├── RulesError         rules, or updates to try them on, cannot be read
└── UnavailableError   the other side is not there (yet); trying again can help
"""

from __future__ import annotations


class ParamServerError(Exception):
    """Says where, what was expected, what was found and what to do."""


class AddressError(ParamServerError):
    pass


class ManifestError(ParamServerError):
    pass


class LogError(ParamServerError):
    pass


class LogDamageError(LogError):
    pass


class StoreExistsError(LogError):
    pass


class StoreMissingError(LogError):
    pass


class FencedError(ParamServerError):
    pass


class GapError(ParamServerError):
    pass


class ConflictError(ParamServerError):
    pass


class MissingBlobError(ParamServerError):
    pass


class BadBlobError(ParamServerError):
    pass


class LimitError(ParamServerError):
    pass


class RequestError(ParamServerError):
    pass


class UnknownModelError(ParamServerError):
    pass


class AccessError(ParamServerError):
    pass


class ConfigError(ParamServerError):
    pass


class RulesError(ParamServerError):
    pass


class UnavailableError(ParamServerError):
    pass
