#!/bin/sh
# Runs inside a machine of its own, under systemd, as scripts/test-deb boots it:
# the life of both packages with a real coordinator. Stops at the first claim that
# does not hold; /debs/passed is written at the end.
#
#	/debs/0.deb, /debs/1.deb    the agent, older and newer
#	/debs/broken.deb            a newer one, with an agent that cannot come up
#	/debs/sha256sum.wasm        a module that prints the digest of its input
#	/debs/c0.deb, /debs/c1.deb  the coordinator, older and newer
set -eu
export DEBIAN_FRONTEND=noninteractive DEIMOS_CONTEXT=/var/lib/deimos-fleet/operator.json
n=0
claim() { n=$((n + 1)); echo "$n: $1"; what=$1; }
trap '[ $? -eq 0 ] || { echo "FAILED: $what"; journalctl --no-pager -n 60 -u deimos-agent -u deimos; }' EXIT

# until LIMIT COMMAND...: waits for COMMAND to succeed.
until_() {
	limit=$1; shift
	while ! "$@" >/dev/null 2>&1; do
		limit=$((limit - 1))
		[ "$limit" -gt 0 ] || { echo "waited in vain for: $*"; "$@"; return 1; }
		sleep 0.5
	done
}
active() { systemctl --quiet is-active "$1"; }
enabled() { systemctl --quiet is-enabled "$1"; }
# Asked by a copy, as one of the packages brings a broken agent.
online() { /debs/agent status --state /var/lib/deimos | grep -q "^agent .*$1, online"; }
key() { sha256sum /var/lib/deimos/identity/key.pem; }
slots() { cat /var/lib/deimos/slots/state.json; }

claim "the coordinator's package starts nothing, and its user and folder are there"
dpkg -i /debs/c0.deb
! active deimos && ! enabled deimos
[ "$(stat -c '%U %a' /var/lib/deimos-fleet)" = "deimos 700" ]

claim "it starts when it is asked to, under its sandbox"
echo 'DEIMOS_ADVERTISE=127.0.0.1' >>/etc/deimos/coordinator.env
systemctl enable --now deimos
until_ 60 deimos status
[ "$(stat -c %U $DEIMOS_CONTEXT)" = deimos ]

claim "an agent without a configuration is installed and does not start"
dpkg -i /debs/0.deb
! active deimos-agent && ! enabled deimos-agent
cp /usr/bin/deimos-agent /debs/agent
[ "$(stat -c '%U %a' /var/lib/deimos)" = "deimos-agent 700" ]
[ "$(stat -c '%U %G %a' /etc/deimos/agent.toml)" = "root deimos-agent 640" ]

claim "the groups of the udev rule are there"
getent group gpio i2c

claim "purged and installed with a configuration, it starts and comes online"
dpkg --purge deimos-agent
[ ! -e /var/lib/deimos ] && [ ! -e /etc/deimos/agent.toml ]
printf 'coordinator = "https://127.0.0.1:8443"\ntoken = "%s"\n' "$(deimos token create)" >/etc/deimos/agent.toml
dpkg --force-confold -i /debs/0.deb
enabled deimos-agent
until_ 60 active deimos-agent
until_ 60 online 0.1.0
[ "$(stat -c '%G %a' /etc/deimos/agent.toml)" = "deimos-agent 640" ]
id=$(key)

claim "it runs as its user, without capabilities, and stores and computes there"
pid=$(pgrep -u deimos-agent -x deimos-agent | head -n1)
[ "$(awk '/^CapBnd/{print $2}' /proc/$pid/status)" = 0000000000000000 ]
[ "$(awk '/^Seccomp:/{print $2}' /proc/$pid/status)" = 2 ]
head -c 3000000 /dev/urandom >/tmp/file
deimos object put --replicas 1 /tmp/file
deimos object get file --out /tmp/back
cmp /tmp/file /tmp/back
deimos job run --input file /debs/sha256sum.wasm | grep -q "$(head -c 1048576 /tmp/file | sha256sum | cut -c1-64)"

claim "the death of the launcher is survived"
systemctl kill --kill-whom=main --signal=KILL deimos-agent
until_ 60 active deimos-agent
until_ 60 online 0.1.0

claim "a disk below /mnt can hold chunks, and the folders of the system cannot be written"
nsenter -t "$(pgrep -u deimos-agent -x deimos-agent | head -n1)" -m sh -c '! touch /usr/x 2>/dev/null && ! touch /etc/deimos/x 2>/dev/null && touch /mnt/x && rm /mnt/x'

claim "an upgrade puts the newer agent on trial, and it confirms itself"
dpkg --force-confold -i /debs/1.deb
until_ 120 online 0.1.1
until_ 30 grep -q '"result": *"confirmed"' /var/lib/deimos/slots/state.json
[ "$(key)" = "$id" ]

claim "the same package again changes nothing"
before=$(slots)
dpkg --force-confold -i /debs/1.deb
until_ 60 online 0.1.1
[ "$(slots)" = "$before" ]

claim "an older package does not take a newer agent back"
dpkg --force-confold -i /debs/0.deb
until_ 60 online 0.1.1
[ "$(slots)" = "$before" ]

claim "a packaged agent that does not come up leaves the old one running, and is not tried at every start"
dpkg --force-confold -i /debs/broken.deb
until_ 120 grep -q '"result": *"rolled_back"' /var/lib/deimos/slots/state.json
until_ 60 online 0.1.1
before=$(slots)
systemctl restart deimos-agent
until_ 60 online 0.1.1
[ "$(slots)" = "$before" ]

claim "a stopped agent stays stopped in an upgrade"
systemctl disable --now deimos-agent
dpkg --force-confold -i /debs/1.deb
! active deimos-agent && ! enabled deimos-agent
systemctl enable --now deimos-agent
until_ 60 online 0.1.1

claim "an upgrade of the coordinator keeps fleet and devices"
fleet=$(sha256sum /var/lib/deimos-fleet/keys/* 2>/dev/null)
dpkg --force-confold -i /debs/c1.deb
until_ 60 deimos status
deimos version | grep -q 0.1.1
[ "$(sha256sum /var/lib/deimos-fleet/keys/* 2>/dev/null)" = "$fleet" ]
until_ 120 sh -c 'deimos device list | grep -q online'

claim "removed, it stops and keeps identity and configuration; installed again, it is the same device"
dpkg --remove deimos-agent
! active deimos-agent
! pgrep -u deimos-agent
[ "$(key)" = "$id" ] && [ -e /etc/deimos/agent.toml ]
dpkg --force-confold -i /debs/1.deb
until_ 120 online 0.1.1
[ "$(key)" = "$id" ]

claim "purged, nothing of it is left but its user"
dpkg --purge deimos-agent
[ ! -e /var/lib/deimos ] && [ ! -e /etc/deimos/agent.toml ]
! pgrep -u deimos-agent
! find /etc/systemd /var/lib/systemd/deb-systemd-helper-* -name '*deimos-agent*' | grep .

claim "the coordinator, removed, keeps the fleet; purged, it does not"
dpkg --remove deimos
[ -e /var/lib/deimos-fleet/keys ] && [ -e /etc/deimos/coordinator.env ]
dpkg --purge deimos
[ ! -e /var/lib/deimos-fleet ] && [ ! -e /etc/deimos ]
! find /etc/systemd /var/lib/systemd/deb-systemd-helper-* -name '*deimos*' ! -name 'deimos-test*' | grep .

echo "$n claims hold"
touch /debs/passed
