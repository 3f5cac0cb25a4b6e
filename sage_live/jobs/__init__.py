"""Jobs as running engines: what carries out the decisions of :class:`sage_core.jobs.JobManager`.

``controller`` pumps the manager; an ``Actuator`` starts, stops and kills: ``local`` (processes of this machine) or
``ray_actuator`` (actors of a Ray cluster); ``follower`` keeps the engines of a gateway in step.
"""
