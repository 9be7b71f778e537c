"""The pages, one file each; `slimtune.studio` says how one is added."""
