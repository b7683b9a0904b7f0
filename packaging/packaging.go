// Package packaging is what ships, and what checks the house.
//
// It has no code of its own yet, only tests of two sorts:
//
//   - house rules, computed from what `go list` says about the sources: which
//     room may import which (docs/ARCHITECTURE.md), what must stay out of the
//     programs that devices run, and a few rules about names and text;
//   - tests of the built programs (TestShipped…), which want DEIMOS_BIN to name
//     the folder that `make build` fills, and are left out without it.
//
// Each house rule is a function from packages to the sentences that tell what
// is wrong. The tests run it twice: over the real sources, where it must find
// nothing, and over invented ones that break it, where it must speak. A rule
// that has gone blind therefore fails, too.
//
// Below it: tour/, the tour of a whole fleet on one machine (`deimos dev`);
// image/, the bootable arm64 image, and init/, its process 1; deb/, the Debian
// packages and systemd units; record-qemu/, which records QEMU's machine.
package packaging
