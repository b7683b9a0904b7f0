// Command deimos-offer offers the agent of a Debian package to the slots that
// deimos-launch starts from. It runs before the launcher, as the agent's user.
//
//	deimos-offer --state /var/lib/deimos --agent /usr/bin/deimos-agent
//
// A packaged agent goes on trial in the slot that is not the current one if it is
// newer than the current one, no other version is on trial, and it was not
// offered before: one that was rolled back is not tried at every start of the
// machine. --again forgets that.
//
// A device that is in no fleet yet cannot confirm a trial, which takes a
// coordinator's welcome; there the packaged agent takes the place of the old one
// at once.
//
// What was offered is STATE/slots/packaged, the SHA-256 of the file, written after
// the slots: a power cut between them offers it twice, never not at all.
//
// It exits with 0 if there is nothing to do, else with 1 and a sentence; the unit
// starts the launcher in either case.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/semver"

	"github.com/deimos-edge/deimos/internal/durable"
	"github.com/deimos-edge/deimos/ota/slot"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("deimos-offer: ")
	state := flag.String("state", "", "the agent's state `directory`")
	agent := flag.String("agent", "", "the packaged agent, a `file`")
	again := flag.Bool("again", false, "offer it also if it was offered before")
	flag.Parse()
	if *state == "" || *agent == "" || flag.NArg() > 0 {
		log.Fatal("--state and --agent are needed, and nothing else")
	}
	said, err := offer(context.Background(), *state, *agent, *again)
	if err != nil {
		log.Fatalf("the packaged agent is not offered, the one of before goes on: %v", err)
	}
	log.Print(said)
}

// offer returns what it did, or why it did nothing.
func offer(ctx context.Context, state, agent string, again bool) (string, error) {
	slots, err := slot.Open(state)
	if err != nil {
		return "", err
	}
	st, err := slots.Load()
	switch {
	case err != nil:
		return "", err
	case st.Current == "":
		return "first start: the launcher installs the packaged agent", nil
	case st.Trial != nil:
		return fmt.Sprintf("version %s is on trial; the packaged agent waits", st.Trial.Version), nil
	}
	sum, err := slot.Digest(agent)
	if err != nil {
		return "", fmt.Errorf("cannot read it: %w", err)
	}
	marker := filepath.Join(state, "slots", "packaged")
	if !again && offered(marker) == sum {
		return "the packaged agent was offered before", nil
	}
	about, err := slot.Ask(ctx, agent)
	switch {
	case err != nil:
		return "", err
	case !semver.IsValid("v" + about.Version):
		return "", fmt.Errorf("its version %q cannot be compared", about.Version)
	case semver.Compare("v"+about.Version, "v"+st.Version()) <= 0:
		return fmt.Sprintf("the packaged agent, version %s, is not newer than version %s in slot %s", about.Version, st.Version(), st.Current), nil
	}
	said, err := put(slots, st, state, agent, slot.Image{Version: about.Version, SHA256: sum})
	if err != nil {
		return "", err
	}
	if err := durable.WriteFile(marker, []byte(sum+"\n"), 0o644); err != nil {
		return "", fmt.Errorf("it is in its slot, but that cannot be noted, so it may be offered again: %w", err)
	}
	return said, nil
}

// put brings the packaged agent into the slot that is not the current one.
func put(slots *slot.Store, st slot.State, state, agent string, image slot.Image) (string, error) {
	_, err := os.Stat(filepath.Join(state, "identity", "membership.json"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		n := st.Current.Other()
		if err := slots.InstallFactory(n, agent, image.Version, ""); err != nil {
			return "", err
		}
		return fmt.Sprintf("installed the packaged agent, version %s, in slot %s", image.Version, n), nil
	case err != nil:
		return "", err
	}
	// No order of the fleet: the outcome is nobody's to be reported to.
	n, err := slots.BeginInstall("", st.Version())
	if err != nil {
		return "", err
	}
	if err := durable.CopyFile(slots.StagedPath(n), agent, 0o755); err != nil {
		return "", fmt.Errorf("copy it into slot %s: %w", n, err)
	}
	if err := slots.MarkTrial("", image); err != nil {
		return "", err
	}
	return fmt.Sprintf("the packaged agent, version %s, goes on trial in slot %s", image.Version, n), nil
}

func offered(marker string) string {
	raw, err := os.ReadFile(marker)
	if err != nil { // missing, or unreadable: offering once too often does no harm
		return ""
	}
	return strings.TrimSpace(string(raw))
}
