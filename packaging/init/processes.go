package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processes starts children and reaps everything that ends, orphans too. Only
// reap waits: whoever else did would take the end of a child from its owner, or
// leave it to reap first. So children are not started with os/exec.
type processes struct {
	mu      sync.Mutex // also held from fork to entry, so that no end comes before
	waiting map[int]chan<- unix.WaitStatus
}

// process is a child.
type process struct {
	pid   int
	ended <-chan unix.WaitStatus // one value
	of    *processes
}

// start runs a program in a process group of its own with nothing on its
// standard input.
func (p *processes) start(argv, env []string, out *os.File) (*process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: env, Files: []uintptr{null.Fd(), out.Fd(), out.Fd()},
		Sys: &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	ended := make(chan unix.WaitStatus, 1)
	if p.waiting == nil {
		p.waiting = map[int]chan<- unix.WaitStatus{}
	}
	p.waiting[pid] = ended
	return &process{pid: pid, ended: ended, of: p}, nil
}

// signal does nothing once the child has ended: its number may be another's.
func (c *process) signal(s unix.Signal) {
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	if _, ok := c.of.waiting[c.pid]; ok {
		_ = unix.Kill(c.pid, s)
	}
}

// kill ends the child and what it started in its group.
func (c *process) kill() {
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	if _, ok := c.of.waiting[c.pid]; ok {
		_ = unix.Kill(-c.pid, unix.SIGKILL)
	}
}

// reap takes every child that has ended, on each SIGCHLD, until ctx ends.
func (p *processes) reap(ctx context.Context, sigchld <-chan os.Signal) {
	for {
		p.reapNow()
		select {
		case <-ctx.Done():
			return
		case <-sigchld:
		}
	}
}

func (p *processes) reapNow() {
	for {
		p.mu.Lock()
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			p.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			p.mu.Unlock()
			return
		}
		if owner, ok := p.waiting[pid]; ok {
			delete(p.waiting, pid)
			_ = unix.Kill(-pid, unix.SIGKILL) // what it left behind in its group
			owner <- status
		}
		p.mu.Unlock()
	}
}

// run runs a tool to its end and returns its exit code and the first of what it
// said. ctx is its limit; a tool that the kernel cannot end is left behind.
func (p *processes) run(ctx context.Context, argv ...string) (int, string, error) {
	return p.runTold(ctx, readSome, nil, argv...)
}

// runTold lets read make of all that the tool says what is kept of it, and calls moved,
// if there is one, while the tool reads and writes.
func (p *processes) runTold(ctx context.Context, read func(io.Reader) string, moved func(), argv ...string) (int, string, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return 0, "", err
	}
	defer r.Close()
	c, err := p.start(argv, toolEnv, w)
	w.Close()
	if err != nil {
		return 0, "", err
	}
	said := make(chan string, 1)
	go func() { said <- read(r) }()
	look := time.NewTicker(toolLook)
	defer look.Stop()
	for before := ""; ; {
		select {
		case status := <-c.ended:
			text := <-said // its group is dead, so the pipe ends
			if !status.Exited() {
				return 0, text, fmt.Errorf("%s was killed by %v", argv[0], status.Signal())
			}
			return status.ExitStatus(), text, nil
		case <-ctx.Done():
			c.kill()
			return 0, "", fmt.Errorf("%s did not end in time: %w", argv[0], context.Cause(ctx))
		case <-look.C:
			now := readWord(fmt.Sprintf("/proc/%d/io", c.pid)) // the numbers of bytes and calls so far
			if moved != nil && now != before {
				moved()
			}
			before = now
		}
	}
}

// toolLook is how often is asked whether a tool reads and writes; tests ask more often.
var toolLook = 10 * time.Second

var toolEnv = []string{"PATH=/sbin:/bin:/usr/sbin:/usr/bin", "LC_ALL=C", "HOME=/"}

const toolText = 4 << 10 // bytes of a tool's output that are kept

func readSome(r io.Reader) string {
	head, _ := io.ReadAll(io.LimitReader(r, toolText))
	_, _ = io.Copy(io.Discard, r)
	return string(bytes.TrimSpace(head))
}
