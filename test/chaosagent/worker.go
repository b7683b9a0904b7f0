package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/deimos-edge/deimos/jobs/sandbox"
	"github.com/deimos-edge/deimos/test/testbed/ploy"
)

// work is a job's worker, which does as the ploy beside the program says, if there is
// one. A lie is the right module over another input: the agent signs a statement over
// what comes out, as it would over the truth.
func work() int {
	if err := scheme(); err != nil {
		fmt.Fprintln(os.Stderr, "chaosagent:", err)
		return 1
	}
	return sandbox.WorkerMain()
}

func scheme() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Dir(self)
	raw, err := os.ReadFile(filepath.Join(dir, ploy.File))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var p ploy.Ploy
	if err == nil {
		err = json.Unmarshal(raw, &p)
	}
	if err != nil {
		return err
	}
	if p.Gate != "" {
		if err := pass(filepath.Join(dir, p.Gate)); err != nil {
			return err
		}
	}
	if p.Share <= 0 {
		return nil
	}
	head, input, err := readTask()
	if err != nil {
		return err
	}
	lies := even(p, head, input) < p.Share
	if lies && p.Meet != "" {
		if lies, err = met(p, head, input); err != nil {
			return err
		}
	}
	if lies {
		if err := note(filepath.Join(dir, ploy.Told)); err != nil {
			return err
		}
		for i := range input {
			input[i] ^= byte(1 + len(p.League)) // the same of all in league
		}
		if p.League == "" {
			binary.BigEndian.PutUint32(input, sum(p.Name, head))
		}
	}
	return giveBack(head, input)
}

// pass waits until a file is there. The job's wall time bounds that: whoever started this
// kills it.
func pass(gate string) error {
	for {
		_, err := os.Stat(gate)
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// readTask takes what the agent tells its worker (see jobs/sandbox): a length, so many
// bytes of JSON, standard input.
func readTask() (head, input []byte, err error) {
	all, err := io.ReadAll(os.Stdin)
	if err != nil {
		return nil, nil, err
	}
	if len(all) < 4 || uint64(len(all)) < 4+uint64(binary.BigEndian.Uint32(all)) {
		return nil, nil, fmt.Errorf("a task of %d bytes is cut off", len(all))
	}
	n := 4 + int(binary.BigEndian.Uint32(all))
	if len(all)-n < 4 {
		return nil, nil, errors.New("who lies about an input of less than 4 bytes is not made for this")
	}
	return all[:n:n], all[n:], nil
}

// giveBack makes it standard input again.
func giveBack(head, input []byte) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	if err := unix.Dup3(int(r.Fd()), 0, 0); err != nil {
		return err
	}
	if err := r.Close(); err != nil {
		return err
	}
	_, err = io.Copy(w, io.MultiReader(bytes.NewReader(head), bytes.NewReader(input))) // less than a pipe holds
	return errors.Join(err, w.Close())
}

// job is a name for a job that who is in league finds, too: what is to be done, without
// what each device has of its own.
func job(head, input []byte) uint32 {
	var t struct {
		Args   []string `json:"args"`
		Digest string   `json:"digest"`
	}
	_ = json.Unmarshal(head[4:], &t) // the worker says what is wrong with it
	return sum(t.Digest, fmt.Append(nil, t.Args), input)
}

// even is drawn from [0, 1) by the job, and by who does it unless he is in league.
func even(p ploy.Ploy, head, input []byte) float64 {
	who := p.League
	if who == "" {
		who = p.Name
	}
	return float64(sum(fmt.Sprint(p.Seed, who), binary.BigEndian.AppendUint32(nil, job(head, input)))) / (math.MaxUint32 + 1)
}

func sum(salt string, parts ...[]byte) uint32 {
	h := fnv.New64a()
	fmt.Fprintln(h, salt)
	for _, p := range parts {
		h.Write(p)
	}
	x := h.Sum64() // whose bits are not even by themselves
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	return uint32(x >> 32)
}

// meeting is how long who has a job waits for another in league to have it, too.
const meeting = 250 * time.Millisecond

// met tells whether another in league has this job now. Who comes first waits; what is
// found is written once and holds for both.
func met(p ploy.Ploy, head, input []byte) (bool, error) {
	at := filepath.Join(p.Meet, fmt.Sprintf("%08x", job(head, input)))
	first, err := claim(at, p.Name)
	if err != nil {
		return false, err
	}
	if !first {
		if who, err := os.ReadFile(at); err != nil || string(who) == p.Name {
			return false, err // the same job once more, of this device
		}
		return verdict(at, "met")
	}
	for end := time.Now().Add(meeting); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(at + ".found"); err == nil {
			break
		}
	}
	return verdict(at, "alone")
}

func verdict(at, mine string) (bool, error) {
	if first, err := claim(at+".found", mine); err != nil || first {
		return mine == "met", err
	}
	found, err := os.ReadFile(at + ".found")
	return string(found) == "met", err
}

// claim writes a file that is not there yet, complete from the start.
func claim(path, text string) (first bool, err error) {
	own := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(own, []byte(text), 0o600); err != nil {
		return false, err
	}
	defer os.Remove(own)
	err = os.Link(own, path)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	return err == nil, err
}

// note counts a lie.
func note(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write([]byte{'x'})
	return errors.Join(err, f.Close())
}
