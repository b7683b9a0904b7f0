#!/bin/sh
# Runs inside a machine of its own, under systemd, as scripts/test-deb boots it:
# the life of both packages with a real coordinator. Stops at the first claim that
# does not hold; /debs/passed is written at the end.
#
#	/debs/0.deb, /debs/1.deb    the agent, older and newer
#	/debs/broken.deb            a newer one, with an agent that cannot come up
#	/debs/conffile.deb          the agent of 1.deb, with another conffile
#	/debs/sha256sum.wasm        a module that prints the digest of its input
#	/debs/c0.deb, /debs/c1.deb  the coordinator, older and newer
set -eu
export DEBIAN_FRONTEND=noninteractive DEIMOS_CONTEXT=/var/lib/deimos-fleet/operator.json
# What the programs in the packages call their version: dpkg has a tilde for the dash.
older=$(dpkg-deb -f /debs/0.deb Version | tr '~' -)
newer=$(dpkg-deb -f /debs/1.deb Version | tr '~' -)
n=0
claim() { n=$((n + 1)); echo "$n: $1"; what=$1; }
trap '[ $? -eq 0 ] || { echo "FAILED: $what"; journalctl --no-pager -n 60 -u deimos-agent -u deimos; }' EXIT

# until LIMIT COMMAND...: waits for COMMAND to succeed, so many seconds on a machine as
# it should be; a slow one has twice the time.
until_() {
	end=$(($(date +%s) + 2 * $1)); shift
	while ! "$@" >/dev/null 2>&1; do
		[ "$(date +%s)" -lt "$end" ] || { echo "waited in vain for: $*"; "$@"; return 1; }
		sleep 0.5
	done
}
# The shell does not end for what stands behind a "!", nor before a "&&": so each
# claim is a line of its own, and what must not be is said by these.
not() { if "$@"; then echo "it must not be that: $*"; return 1; fi; }
gone() { for f; do not test -e "$f"; done; }
is() { [ "$1" = "$2" ] || { echo "it is $1, not $2"; return 1; }; }
active() { systemctl --quiet is-active "$1"; }
enabled() { systemctl --quiet is-enabled "$1"; }
# Asked by a copy, as one of the packages brings a broken agent.
online() { /debs/agent status --state /var/lib/deimos | grep -q "^agent .*$1, online"; }
key() { sha256sum /var/lib/deimos/identity/key.pem; }
slots() { cat /var/lib/deimos/slots/state.json; }
trial() { grep -A8 '"trial"' /var/lib/deimos/slots/state.json | grep -q "\"version\": *\"$1\""; }
restarts() { systemctl show --property=NRestarts --value deimos-agent; }
restarted_since() { [ "$(restarts)" -gt "$1" ]; }
# A configuration with a token of its own.
configure() { printf 'coordinator = "https://127.0.0.1:8443"\ntoken = "%s"\n' "$(deimos token create)" >/etc/deimos/agent.toml; }
# What udev would do with a device that is not there, by the installed rules, and
# whether ours are among them.
udev() { umockdev-run --device=/debs/devices.umockdev -- udevadm test --action=add "/sys/devices/$1" 2>&1; }
handed() { udev "$1" | grep -E 'deimos-agent.rules:[0-9]+ (GROUP|MODE|RUN) '; }
# What systemd and its helper know of a unit.
enabling() { find /etc/systemd /var/lib/systemd/deb-systemd-helper-* -name "*$1*" ! -name 'deimos-test*' | grep .; }

claim "the coordinator's package starts nothing, and its user and folder are there"
dpkg -i /debs/c0.deb
not active deimos
not enabled deimos
is "$(stat -c '%U %a' /var/lib/deimos-fleet)" "deimos 700"

claim "it starts when it is asked to, under its sandbox"
echo 'DEIMOS_ADVERTISE=127.0.0.1' >>/etc/deimos/coordinator.env
systemctl enable --now deimos
until_ 60 deimos status
is "$(stat -c %U $DEIMOS_CONTEXT)" deimos

claim "an agent without a configuration is installed and does not start"
dpkg -i /debs/0.deb
not active deimos-agent
not enabled deimos-agent
cp /usr/bin/deimos-agent /debs/agent
is "$(stat -c '%U %a' /var/lib/deimos)" "deimos-agent 700"
is "$(stat -c '%U %G %a' /etc/deimos/agent.toml)" "root deimos-agent 640"

claim "the udev rule hands over lights of the board, GPIO, I²C and watchdogs; no keyboard's light, no disk"
udev board/leds/board:green:status | grep "^run: '/bin/chgrp deimos-agent .*/brightness "
udev board/gpiochip0 | grep "deimos-agent.rules:.* GROUP $(getent group gpio | cut -d: -f3)$"
udev board/i2c-1 | grep "deimos-agent.rules:.* GROUP $(getent group i2c | cut -d: -f3)$"
udev board/watchdog0 | grep "deimos-agent.rules:.* GROUP $(getent group deimos-agent | cut -d: -f3)$"
udev keyboard/input3/input3::capslock | grep '^SUBSYSTEM=leds$'
not handed keyboard/input3/input3::capslock
udev board/sda | grep '^SUBSYSTEM=block$'
not handed board/sda

claim "purged and installed with a configuration, it starts and comes online"
dpkg --purge deimos-agent
gone /var/lib/deimos /etc/deimos/agent.toml
not enabling deimos-agent
configure
(umask 077; dpkg --force-confold -i /debs/0.deb)
enabled deimos-agent
until_ 60 active deimos-agent
until_ 60 online "$older"
is "$(stat -c '%G %a' /etc/deimos/agent.toml)" "deimos-agent 640"
id=$(key)

claim "it runs as its user, without capabilities, and stores and computes there"
pid=$(pgrep -u deimos-agent -x deimos-agent | head -n1)
is "$(awk '/^CapBnd/{print $2}' "/proc/$pid/status")" 0000000000000000
is "$(awk '/^Seccomp:/{print $2}' "/proc/$pid/status")" 2
head -c 3000000 /dev/urandom >/tmp/file
deimos object put --plain --replicas 1 /tmp/file
deimos object get --plain file --out /tmp/back
cmp /tmp/file /tmp/back
deimos job run --input file /debs/sha256sum.wasm | grep -q "$(sha256sum </tmp/file | cut -c1-64)"

claim "the death of the launcher is survived"
systemctl kill --kill-whom=main --signal=KILL deimos-agent
until_ 60 active deimos-agent
until_ 60 online "$older"

claim "an agent that stands still is started again by systemd's watchdog"
mkdir /run/systemd/system/deimos-agent.service.d
printf '[Service]\nWatchdogSec=15\n' >/run/systemd/system/deimos-agent.service.d/test.conf
systemctl daemon-reload
systemctl restart deimos-agent
until_ 60 online "$older"
before=$(restarts)
sleep 20 # longer than the limit: it is fed
is "$(restarts)" "$before"
pkill --signal STOP -u deimos-agent -x deimos-agent
until_ 60 restarted_since "$before"
until_ 60 online "$older"

claim "the calls by which an agent could confine its jobs further are not forbidden"
# landlock_create_ruleset, which has this number everywhere; the kernel need not
# have it. 1 is EPERM.
printf '[Service]\nExecStartPre=/usr/bin/perl -e "exit(syscall(444, 0, 0, 1) < 0 && $$! == 1)"\n' >/run/systemd/system/deimos-agent.service.d/test.conf
systemctl daemon-reload
systemctl restart deimos-agent
rm -r /run/systemd/system/deimos-agent.service.d
systemctl daemon-reload

claim "with disk-health.conf it runs as root with two capabilities, computes, and without it again as its user"
install -D -m 644 /usr/share/doc/deimos-agent/examples/disk-health.conf /etc/systemd/system/deimos-agent.service.d/disk-health.conf
systemctl daemon-reload
systemctl restart deimos-agent
until_ 60 online "$older"
is "$(awk '/^CapEff/{print $2}' "/proc/$(pgrep -u root -x deimos-agent | head -n1)/status")" \
	"$(printf %016x $((0x$(awk '/^CapBnd/{print $2}' /proc/1/status) & 0x220000)))" # as far as this machine has them
deimos job run --input file /debs/sha256sum.wasm | grep -q "$(sha256sum </tmp/file | cut -c1-64)"
rm -r /etc/systemd/system/deimos-agent.service.d
systemctl daemon-reload
systemctl restart deimos-agent
until_ 60 online "$older"
is "$(key)" "$id"
is "$(stat -c %U /var/lib/deimos/identity/key.pem)" deimos-agent

claim "a disk below /mnt can hold chunks; the folders of the system cannot be written"
inside="nsenter --mount --target=$(pgrep -u deimos-agent -x deimos-agent | head -n1)"
not $inside touch /usr/x
not $inside touch /etc/deimos/x
is "$($inside stat --format=%a /home)" 0
$inside touch /mnt/x
$inside rm /mnt/x

claim "an upgrade puts the newer agent on trial, and it confirms itself"
dpkg --force-confold -i /debs/1.deb
until_ 120 online "$newer"
# A trial lasts for a minute at least.
until_ 120 grep -q '"result": *"confirmed"' /var/lib/deimos/slots/state.json
is "$(key)" "$id"

claim "with the slots removed, the packaged agent runs, whatever its version"
systemctl stop deimos-agent
rm -r /var/lib/deimos/slots
dpkg --force-confold -i /debs/0.deb
systemctl start deimos-agent
until_ 60 online "$older"
is "$(key)" "$id"

claim "while an agent is on trial, an upgrade leaves the trial alone"
systemctl stop deimos
dpkg --force-confold -i /debs/1.deb
until_ 60 trial "$newer"
dpkg --force-confold -i /debs/broken.deb
active deimos-agent
until_ 60 trial "$newer"
systemctl start deimos
until_ 240 online "$newer"
until_ 120 grep -q '"result": *"confirmed"' /var/lib/deimos/slots/state.json

claim "an edited conffile is kept unless its owner says otherwise, and a token in it stays unreadable"
dpkg --force-confold -i /debs/1.deb
not dpkg -i /debs/conffile.deb </dev/null
online "$newer"
dpkg --force-confold --configure deimos-agent
grep -q '^token' /etc/deimos/agent.toml
is "$(stat -c '%U %G %a' /etc/deimos/agent.toml)" "root deimos-agent 640"
until_ 60 online "$newer"
dpkg --force-confnew -i /debs/1.deb
not grep -q '^token' /etc/deimos/agent.toml
grep -q '^token' /etc/deimos/agent.toml.dpkg-old
is "$(stat -c '%U %G %a' /etc/deimos/agent.toml)" "root deimos-agent 640"
is "$(stat -c %a /etc/deimos/agent.toml.dpkg-old)" 640
until_ 60 online "$newer"
mv /etc/deimos/agent.toml.dpkg-old /etc/deimos/agent.toml

claim "the same package again changes nothing"
before=$(slots)
dpkg --force-confold -i /debs/1.deb
until_ 60 online "$newer"
is "$(slots)" "$before"

claim "an older package does not take a newer agent back"
dpkg --force-confold -i /debs/0.deb
until_ 60 online "$newer"
is "$(slots)" "$before"

claim "a packaged agent that does not come up leaves the old one running, and is not tried at every start"
dpkg --force-confold -i /debs/broken.deb
until_ 120 grep -q '"result": *"rolled_back"' /var/lib/deimos/slots/state.json
until_ 60 online "$newer"
before=$(slots)
systemctl restart deimos-agent
until_ 60 online "$newer"
is "$(slots)" "$before"

claim "a stopped agent stays stopped in an upgrade"
systemctl disable --now deimos-agent
dpkg --force-confold -i /debs/1.deb
not active deimos-agent
not enabled deimos-agent
systemctl enable --now deimos-agent
until_ 60 online "$newer"

claim "an upgrade of the coordinator keeps fleet and devices"
fleet=$(sha256sum /var/lib/deimos-fleet/keys/*)
dpkg --force-confold -i /debs/c1.deb
until_ 60 deimos status
deimos version | grep -q "$newer"
is "$(sha256sum /var/lib/deimos-fleet/keys/*)" "$fleet"
until_ 120 sh -c 'deimos device list | grep -q online'

claim "and so does a downgrade"
dpkg --force-confold -i /debs/c0.deb
until_ 60 deimos status
is "$(sha256sum /var/lib/deimos-fleet/keys/*)" "$fleet"
until_ 120 sh -c 'deimos device list | grep -q online'

claim "removed, it stops and keeps identity and configuration; installed again, it is the same device"
dpkg --remove deimos-agent
not active deimos-agent
not pgrep -u deimos-agent
is "$(key)" "$id"
test -e /etc/deimos/agent.toml
dpkg --force-confold -i /debs/1.deb
until_ 120 online "$newer"
is "$(key)" "$id"

claim "purged, nothing of it is left but its user"
dpkg --purge deimos-agent
gone /var/lib/deimos /etc/deimos/agent.toml
not pgrep -u deimos-agent
not enabling deimos-agent
gone /usr/bin/deimos-agent /usr/lib/deimos

claim "installed after a purge, it is another device"
mkdir -p /etc/deimos
configure
dpkg --force-confold -i /debs/0.deb
until_ 60 online "$older"
not is "$(key)" "$id"
dpkg --purge deimos-agent
gone /var/lib/deimos /etc/deimos/agent.toml

claim "a purge goes through where disks are mounted: one below the state is left as it is, and the purge says so"
dpkg -i /debs/0.deb
mount --bind /var/lib/deimos /var/lib/deimos
mkdir /var/lib/deimos/identity /var/lib/deimos/disk
mount -t tmpfs deimos-test /var/lib/deimos/disk
touch /var/lib/deimos/disk/kept
dpkg --purge deimos-agent 2>&1 | tee /tmp/purge
grep -q '^deimos-agent: not all of /var/lib/deimos' /tmp/purge
not dpkg -s deimos-agent
is "$(ls -A /var/lib/deimos)" disk
test -e /var/lib/deimos/disk/kept
umount /var/lib/deimos/disk /var/lib/deimos
rm -r /var/lib/deimos

claim "so is one of the same file system; where the state folder is a link, what it leads to goes with it, if that was given to the agent"
dpkg -i /debs/0.deb
mkdir -p /srv/theirs /var/lib/deimos/disk
touch /srv/theirs/kept
mount --bind /srv/theirs /var/lib/deimos/disk
dpkg --purge deimos-agent
is "$(ls -A /var/lib/deimos)" disk
test -e /srv/theirs/kept
umount /var/lib/deimos/disk
rm -r /var/lib/deimos
install -d -o deimos-agent -m 700 /srv/given
ln -s /srv/given /var/lib/deimos
dpkg -i /debs/0.deb
mkdir -p /var/lib/deimos/identity
touch /var/lib/deimos/identity/key.pem
dpkg --purge deimos-agent
gone /srv/given
not test -L /var/lib/deimos
ln -s /srv/theirs /var/lib/deimos
dpkg -i /debs/0.deb
dpkg --purge deimos-agent
test -e /srv/theirs/kept
rm /var/lib/deimos

claim "the coordinator, removed, keeps the fleet and comes back with it; purged, it does not"
dpkg --remove deimos
test -e /etc/deimos/coordinator.env
not active deimos
dpkg --force-confold -i /debs/c0.deb
until_ 60 deimos status
is "$(sha256sum /var/lib/deimos-fleet/keys/*)" "$fleet"
dpkg --remove deimos
mount --bind /var/lib/deimos-fleet /var/lib/deimos-fleet
dpkg --purge deimos
is "$(ls -A /var/lib/deimos-fleet)" ""
umount /var/lib/deimos-fleet
rmdir /var/lib/deimos-fleet
gone /etc/deimos
not enabling deimos

echo "$n claims hold"
touch /debs/passed
