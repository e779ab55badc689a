"""The shim: one tiny process per container that owns its stdio, its log and its exit. Standard library only."""

VERSION = "0.1.0"
