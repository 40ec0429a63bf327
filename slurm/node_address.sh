#!/bin/bash
# This node's IPv4 address: of the interface EE_INTERFACE (slurm/site.env) if one is named, else of the host's name.
set -euo pipefail
if [[ -n ${EE_INTERFACE:-} ]]; then
  found=$(ip -4 -o address show dev "$EE_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }') || found=''
else
  found=$(getent ahostsv4 "$(hostname)" | awk '{ print $1; exit }') || found=''
fi
if [[ -z $found ]]; then
  echo "error: $(hostname): no IPv4 address found; name the cluster's interface as EE_INTERFACE in slurm/site.env" >&2
  exit 2
fi
echo "$found"
