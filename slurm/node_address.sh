#!/bin/bash
# This node's IPv4 address: of the interface EE_INTERFACE (slurm/site.env) if one is named, else of the host's name.
set -euo pipefail
if [[ -n ${EE_INTERFACE:-} ]]; then
  address=$(ip -4 -o address show dev "$EE_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }') || address=''
else
  address=$(getent ahostsv4 "$(hostname)" | awk '{ print $1; exit }') || address=''
fi
if [[ -z $address ]]; then
  echo "error: $(hostname): no IPv4 address found; name the cluster's interface as EE_INTERFACE in slurm/site.env" >&2
  exit 2
fi
# Debian's installers map a host's name to 127.0.1.1, where other nodes find nobody.
if [[ $address == 127.* && ${SLURM_JOB_NUM_NODES:-1} -gt 1 ]]; then
  echo "error: $(hostname): its address is $address, which other nodes cannot reach; name the cluster's interface as EE_INTERFACE in slurm/site.env" >&2
  exit 2
fi
echo "$address"
