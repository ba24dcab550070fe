"""The MLflow mirror: run folders are copied into MLflow by a process beside the workers, which never import it.

The folders are the truth and the mirror only ever reads them; the one file it adds to a run folder, mirror.json, says
what was sent where, and losing it costs nothing but sending everything again. MLflow drops a point that it already has
with the same value, step and time, so sending again changes nothing. For that a step that was redone after a kill is
sent as it was first journaled: the redone line has the same numbers and another time, so it would make a second point.

In MLflow: experiment `crm`; a parent run per sweep (tags crm.kind=sweep, crm.sweep) with its cells in cells.json and
its report's tables, figures and panels in report/; below it a run per crm run (tags crm.kind=run, crm.run_id,
crm.token) under the sweep that asked for it first. Metrics are train/<name>, train/hidden/<modality>, val/miou,
val/iou/<class number>, system/<name> and <selection>/<condition>/miou, where the condition's = is written : because
MLflow allows no =; the tag crm.condition.<as written> names the condition itself.
"""
