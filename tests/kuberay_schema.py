"""What KubeRay's operator accepts (ray.io/v1), as JSON Schema: the fields that our file may use, with their types.

By the types of the operator (raycluster_types.go and rayjob_types.go in ray-operator/apis/ray/v1;
authOptions since 1.5) and of Kubernetes' PodSpec. The whole definition, a megabyte of YAML, comes with the operator.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
QUANTITY: Schema = {"type": ["string", "integer"]}


def fields(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def mapping(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


RESOURCES = fields(requests=mapping(QUANTITY), limits=mapping(QUANTITY))
SECRET = fields("secretKeyRef", secretKeyRef=fields("name", "key", name=TEXT, key=TEXT))
CONTAINER = fields(
    "name", "image",
    name=TEXT, image=TEXT, command=list_of(TEXT), args=list_of(TEXT), resources=RESOURCES,
    env=list_of(fields("name", name=TEXT, value=TEXT, valueFrom=SECRET)),
    volumeMounts=list_of(fields("name", "mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=SWITCH)),
)  # fmt: skip
POD = fields(
    "containers",
    containers={**list_of(CONTAINER), "minItems": 1},
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    nodeSelector=mapping(TEXT),
    serviceAccountName=TEXT,
    volumes=list_of(
        fields(
            "name", name=TEXT, emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
            persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly=SWITCH),
        )
    ),
    tolerations=list_of(
        fields(
            key=TEXT, value=TEXT, operator={"enum": ["Exists", "Equal"]},
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
)  # fmt: skip
TEMPLATE = fields("spec", metadata=fields(labels=mapping(TEXT), annotations=mapping(TEXT)), spec=POD)
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields("mode", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT, resources=RESOURCES, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=fields("rayStartParams", "template", rayStartParams=mapping(TEXT), template=TEMPLATE),
    workerGroupSpecs=list_of(
        fields(
            "groupName", "minReplicas", "maxReplicas", "rayStartParams", "template",
            groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT, rayStartParams=mapping(TEXT), template=TEMPLATE,
        )
    ),
)  # fmt: skip
RAY_JOB = fields(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    clusterSelector=mapping(TEXT),
    rayClusterSpec=RAY_CLUSTER,
    submitterPodTemplate=TEMPLATE,
    submitterConfig=fields(backoffLimit=COUNT),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=COUNT,
    suspend=SWITCH,
)
CLAIM = fields(
    "accessModes", "resources",
    accessModes=list_of({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}),
    resources=RESOURCES, storageClassName=TEXT,
)  # fmt: skip
KINDS = {
    "PersistentVolumeClaim": ("v1", CLAIM),
    "RayCluster": ("ray.io/v1", RAY_CLUSTER),
    "RayJob": ("ray.io/v1", RAY_JOB),
}


def document(kind: str) -> Schema:
    """A whole Kubernetes object of that kind."""
    version, spec = KINDS[kind]
    metadata = fields("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, namespace=TEXT)
    return fields(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion={"const": version}, kind={"const": kind}, metadata=metadata, spec=spec,
    )  # fmt: skip
