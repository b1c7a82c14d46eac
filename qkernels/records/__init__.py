"""Preference records: what a pair is, the layouts it comes in, the files, folders and hub data sets that hold it.

    pairs.py     `Message`, `Preference`, and messages out of what data sets write
    layouts.py   from a record, in any of the known layouts, to a `Preference`
    sources.py   from a file, a folder or a name on the hub to records, one at a time
    tables.py    Parquet, Arrow and CSV as records

`qkernels.data` is the public face. Needs neither torch nor transformers; pyarrow and datasets where a source needs
them.
"""
