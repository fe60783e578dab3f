"""When a run counts as dead or stuck: one place for the thresholds, from which defaults and alerts are derived.

Three questions have three answers. Is a process there? It sends heartbeats, and is lost after `SILENT_SECONDS`. Do its
ranks make progress? Without any, the node's health check fails after `STALL_SECONDS`, which only tells; `mixmae launch`
ends the run after `STUCK_SECONDS`, and the alert MixmaeNoProgress fires then for runs that nothing supervises. Did all
ranks come at all? They have `JOIN_SECONDS`.
"""

HEARTBEAT_SECONDS = 2.0
"""Between two heartbeats of supervisors, in each direction."""
SILENT_SECONDS = 10 * HEARTBEAT_SECONDS
"""A peer that sent nothing for this long is lost."""
JOIN_SECONDS = 120.0
"""In which all ranks of a start must have joined: the default of launch.join_seconds, and the doctor's."""
STUCK_SECONDS = 600.0
"""Without progress of any rank after which a run is ended: the default of launch.stuck_seconds, and the alert's."""
STALL_SECONDS = STUCK_SECONDS / 2
"""Without a step after which a node reports ill health: the default of monitoring.stall_seconds."""
