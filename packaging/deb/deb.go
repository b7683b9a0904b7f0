// Package deb makes the Debian packages: `make deb`, by the script build and
// nfpm, into bin/deb.
//
//	deimos-agent  amd64, arm64, armhf   the agent, its launcher, a unit, a udev rule
//	deimos        amd64, arm64          the coordinator and the command line, a unit
//
// # Who owns what
//
//   - /usr belongs to the package. Nothing there is written by the programs.
//   - /etc/deimos/agent.toml and coordinator.env are conffiles: dpkg asks before
//     it replaces what was edited. The first may hold a token and is readable by
//     root and the agent only.
//   - /var/lib/deimos and /var/lib/deimos-fleet belong to the programs. Remove
//     keeps them, purge removes them and with them the identity. What lies on
//     other disks is not ours to remove, also where one is mounted below; the
//     purge goes through and says so. `deimos-agent reset` removes it.
//   - The users stay after a purge, as files elsewhere may still be theirs.
//
// # Starting
//
// The agent is enabled and started by its installation if it knows its fleet: a
// coordinator in agent.toml or an enrolment in /var/lib/deimos. Otherwise the
// installation says what to do. The coordinator opens ports and makes the keys of
// a new fleet, and the package is also the command line, so it never starts by
// itself. An upgrade starts again what ran.
//
// # A package and an update by the fleet
//
// Two ways lead to a new agent, and the launcher's slots (ota/slot) are where they
// meet. /usr/bin/deimos-agent is the factory agent of the launcher and the command
// line; what runs as the service is the one in a slot. Before each start of the
// service, deimos-offer puts a packaged agent that is newer than the current
// slot's on trial in the other one, once. So a package's agent must reach the
// fleet and confirm itself as any other, else the old one goes on; a package that
// is older than what the fleet has installed changes nothing. The launcher is not
// in a slot: the package is the only way to a new one.
//
// # What holds
//
//   - A pre-release is older than its release: 0.2.0-rc.1 is 0.2.0~rc.1 to dpkg.
//   - Same sources, same bytes: times are the day of the release, owners root,
//     modes are set here and not taken from the checkout.
//   - Both units are rated 2.0 or better by `systemd-analyze security`.
//   - lintian is silent; each exception stands, with its reason, in the overrides.
//
// Tests: those of the files run with all others. `make deb-test` runs lintian over
// the built packages and installs them, on an overlay of this machine's files,
// under a systemd of their own (lifecycle.sh): root and systemd-nspawn are needed.
package deb
