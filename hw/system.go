package hw

import (
	"context"
	"slices"
	"strconv"
	"strings"

	"github.com/shirou/gopsutil/v3/cpu"
	"github.com/shirou/gopsutil/v3/mem"
)

func (p *prober) system(context.Context) (func(*Inventory), notes) {
	var missing notes
	s := System{
		OS:     osName(p.tree),
		Kernel: p.word("proc/sys/kernel/osrelease"),
		Arch:   p.arch,
		BootID: p.word("proc/sys/kernel/random/boot_id"),
		User:   p.user,
	}
	if !p.live() {
		s.Root = p.root
	}
	up, err := parseUptime(p.word("proc/uptime"))
	if err != nil {
		missing.add("system", NoteUnreadable, "uptime", "the kernel does not say how long it has been running")
	}
	s.Uptime = up
	return func(inv *Inventory) { inv.System = s }, missing
}

// osName finds PRETTY_NAME in os-release(5).
func osName(t tree) string {
	for _, name := range []string{"etc/os-release", "usr/lib/os-release"} {
		raw, err := t.bytes(name)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(raw)) {
			if v, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
				return clean(strings.Trim(v, `"'`))
			}
		}
	}
	return "Linux"
}

// parseUptime reads the first number of /proc/uptime, seconds since boot.
func parseUptime(s string) (float64, error) {
	first, _, _ := strings.Cut(s, " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil || !(v >= 0 && v < 1e10) {
		return 0, strconv.ErrRange
	}
	return v, nil
}

func (p *prober) cpu(ctx context.Context) (func(*Inventory), notes) {
	var missing notes
	info, err := cpu.InfoWithContext(ctx)
	if err != nil || len(info) == 0 {
		missing.add("cpu", NoteUnreadable, "", "the kernel does not describe the processor in /proc/cpuinfo")
	}
	c := CPU{Cores: len(info), Crypto: []string{}}
	var models []string
	for _, i := range info {
		m := clean(i.ModelName)
		if m == "" || m == "Undefined" {
			m = clean(i.VendorID + " " + i.Model)
		}
		models = append(models, m)
		c.MaxMHz = max(c.MaxMHz, i.Mhz)
	}
	c.Model = countModels(models)
	if len(info) > 0 {
		c.Crypto = cryptoOf(info[0].Flags)
	}
	if c.MaxMHz < 0 || c.MaxMHz > 20000 {
		missing.add("cpu", NoteImplausible, "", "the clock speed that the kernel gives is not plausible and was dropped")
		c.MaxMHz = 0
	}
	return func(inv *Inventory) { inv.CPU = c }, missing
}

// cryptoNames maps the kernel's flags of x86 ("flags") and ARM ("Features",
// Documentation/arch/arm64/elf_hwcaps) to one vocabulary.
var cryptoNames = []struct {
	name  string
	flags []string
}{
	{"aes", []string{"aes"}},
	{"clmul", []string{"pclmulqdq", "pmull"}},
	{"sha1", []string{"sha_ni", "sha1"}},
	{"sha2", []string{"sha_ni", "sha2"}},
	{"sha512", []string{"sha512"}},
	{"sha3", []string{"sha3"}},
	{"crc32", []string{"sse4_2", "crc32"}},
	{"rng", []string{"rdrand", "rng"}},
}

func cryptoOf(flags []string) []string {
	found := []string{}
	for _, c := range cryptoNames {
		if slices.ContainsFunc(c.flags, func(f string) bool { return slices.Contains(flags, f) }) {
			found = append(found, c.name)
		}
	}
	return found
}

func (p *prober) memory(ctx context.Context) (func(*Inventory), notes) {
	var missing notes
	m, err := readMemory(ctx)
	if err != nil {
		missing.add("memory", NoteUnreadable, "", "the kernel's figures in /proc/meminfo "+err.Error())
	}
	return func(inv *Inventory) { inv.Memory = m }, missing
}

type memoryError string

func (e memoryError) Error() string { return string(e) }

func readMemory(ctx context.Context) (Memory, error) {
	v, err := mem.VirtualMemoryWithContext(ctx)
	if err != nil {
		return Memory{}, memoryError("cannot be read: " + clean(err.Error()))
	}
	if v.Total == 0 || v.Available > v.Total || v.SwapFree > v.SwapTotal {
		return Memory{}, memoryError("contradict each other and were dropped")
	}
	return Memory{Total: v.Total, Available: v.Available, SwapTotal: v.SwapTotal, SwapFree: v.SwapFree}, nil
}
